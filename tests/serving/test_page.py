"""The page in headless Chromium: pictures, two methods, a word's map, the lines to copy."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess

import pytest

from lvlm_jax import LVLM
from lvlm_jax.weights.names import pocket_file
from tests.cli.command import run
from tests.serving.conftest import running

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api", reason="the page is clicked through with playwright")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_compares_two_methods(width, tmp_path, monkeypatch, capsys):
    def asking(question):
        picture = {"type": "image", "image": pocket_file("sample.png")}
        return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]

    model = LVLM.from_pretrained("pocket")
    with running(model, name="pocket") as server, sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(300_000)
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.goto(server.url)
        page.get_by_label("choose pictures").set_input_files(str(pocket_file("sample.png")))
        page.get_by_label("Longest answer").fill("24")
        page.get_by_label("method of the right answer").select_option("cmac")
        page.get_by_label("alpha, a number").fill("1.5")
        page.get_by_role("button", name="Ask both").press("Enter")
        for side in (0, 1):
            page.locator(".said", has_text="tokens in").nth(side).wait_for()
        texts = page.locator(".answer").all_inner_texts()
        messages = asking("Please describe this image in detail.")
        expected = [model.generate(messages, method, max_new_tokens=24).text[0] for method in (None, "cmac:alpha=1.5")]
        assert texts == expected
        differs = page.locator(".answer .differs").count()
        assert (differs > 0) is (texts[0] != texts[1])
        page.locator(".answer").nth(1).locator("button").nth(1).press("Enter")
        page.locator("#maps canvas").nth(1).wait_for()  # of the same word in both answers
        assert re.match("Where it looked before “image", page.locator("#looked").inner_text())
        captions = page.locator("#maps figcaption").all_inner_texts()
        assert all(re.fullmatch("[0-9.]+\xa0% of its attention on sample.png", one) for one in captions)
        whole = f"{server.url}/{page.locator('#whole').get_attribute('href')}"
        page.get_by_text("The same from a program or a shell").press("Enter")
        page.get_by_label("For").select_option("1")
        question = """It's $HOME, "a" \\ @b@?"""
        page.get_by_label("Question").fill(question)
        (expected,) = model.generate(asking(question), "cmac:alpha=1.5", max_new_tokens=24).text
        curl, python, infer = (page.locator(f"#line-{name}").inner_text() for name in ("curl", "python", "lvlm-infer"))
        shutil.copy(pocket_file("sample.png"), tmp_path)
        monkeypatch.chdir(tmp_path)
        said = json.loads(subprocess.run(["bash", "-c", curl], capture_output=True, check=True).stdout)
        assert said["choices"][0]["message"]["content"] == expected
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(python, {})
        assert printed.getvalue() == expected + "\n"
        assert "--method 'cmac' --alpha 1.5" in infer
        code, out, _ = run(monkeypatch, capsys, *shlex.split(infer)[1:])
        assert code == 0 and expected in out
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Dark").press("Enter")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.goto(whole)
        page.locator("#answers .text button").nth(1).press("Enter")
        assert page.locator("#word").inner_text() == "image" and page.locator("#answers .frame canvas").count() == 1
        assert not faults
        browser.close()
