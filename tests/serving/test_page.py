"""The page in headless Chromium: pictures, two methods, a word's map, the lines to copy."""

import re
import shutil

import pytest

from lvlm_jax import LVLM
from lvlm_jax.weights.names import pocket_file
from tests.serving.conftest import running

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api", reason="the page is clicked through with playwright")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_compares_two_methods(width):
    model = LVLM.from_pretrained("pocket")
    with running(model) as server, sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
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
            page.locator(".said", has_text="tokens in").nth(side).wait_for(timeout=300_000)
        texts = page.locator(".answer").all_inner_texts()
        messages = [{"role": "user", "content": [{"type": "image", "image": pocket_file("sample.png")},
                     {"type": "text", "text": "Please describe this image in detail."}]}]  # fmt: skip
        expected = [model.generate(messages, method, max_new_tokens=24).text[0] for method in (None, "cmac:alpha=1.5")]
        assert texts == expected
        differs = page.locator(".answer .differs").count()
        assert (differs > 0) is (texts[0] != texts[1])
        page.locator(".answer").nth(1).locator("button").nth(1).press("Enter")
        page.locator("#maps canvas").wait_for(timeout=300_000)
        assert re.match("Where it looked before “image", page.locator("#looked").inner_text())
        status, _, whole = server.request("GET", "/" + page.locator("#whole").get_attribute("href"))
        assert status == 200 and b"Where the model looked" in whole
        page.get_by_text("The same from a program or a shell").press("Enter")
        page.get_by_label("For").select_option("1")
        assert "--method cmac --alpha 1.5" in page.locator("#line-lvlm-infer").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Dark").press("Enter")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert not faults
        browser.close()
