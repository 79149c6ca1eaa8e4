"""Names of methods: files of the package, other packages' entry points, a user's files, and what is refused."""

import importlib
import importlib.metadata
import textwrap

import jax
import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import registry
from lvlm_jax.methods.parse import as_method

LIFT = """
    import jax.numpy as jnp

    from lvlm_jax import methods


    {decorator}
    class Lift(methods.Method):
        \"\"\"Raises image logits.\"\"\"

        delta: methods.Strength = methods.strength(0.5, "how far", low=0)
        PRESETS = {{"high": dict(delta=4.0)}}

        def logits(self, site, logits):
            return jnp.where(site.image[:, None, None, :], logits + self.delta, logits)


    VALUE = Lift
    number = 3


    def function():
        pass
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder; what a test registers is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_BROKEN", set())
    return tmp_path


def write(path, decorator='@methods.register("lift")'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(LIFT.format(decorator=decorator)))


def test_every_file_of_the_folder_is_found():
    assert len(methods.names()) == 34
    for name in methods.names():
        cls = methods.get(name)
        assert getattr(methods, cls.__name__) is cls and cls.__name__ in methods.__all__


@pytest.mark.parametrize("decorator", ['@methods.register("lift")', ""], ids=["registered", "bare"])
@pytest.mark.parametrize("source", ["own_{}", "own_{}.py", "below/own_{}.py"])
def test_a_class_of_the_user_works_by_module_and_by_file(folder, request, decorator, source):
    source = source.format(len(request.node.name))  # a module's name is taken once
    write(folder / (source if source.endswith(".py") else f"{source}.py"), decorator)
    method = as_method(f"{source}:Lift")
    assert (type(method).__name__, float(method.delta)) == ("Lift", 0.5)
    assert type(as_method("lift")) is type(as_method(f"{source}:Lift")) is type(method)
    assert len(jax.tree.leaves(method)) == 1
    assert float(as_method(f"{source}:Lift/high").delta) == 4
    chained = as_method(f"eah+{source}:Lift:delta=2+cmac:alpha=1")
    assert chained.label == "EAH + Lift + CMAC" and float(chained.members[1].delta) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("refused.py:Lost", "there is no Lost in file refused.py"),
        ("refused.py:number", "is a int; expected a class as in class Lift"),
        ("refused.py:function", "is a function; expected a class"),
        ("refused.py:methods", "is a module; expected a class"),
        ("absent.py:Lift", "there is no file absent.py"),
        ("absent:Lift", "module absent cannot be imported"),
        ("pathlib:Path", "is a class, but not a methods.Method"),
        ("cmac:alpha", "module cmac cannot be imported .*; a setting of cmac is alpha=VALUE"),
        ("lft", r"no method .lft.; expected one of .*capl, .* \(or your own, as module:Class or file.py:Class\)"),
    ],
)
def test_what_is_no_method_is_refused(folder, words, message):
    write(folder / "refused.py")
    with pytest.raises(LVLMError, match=message) as refused:
        as_method(words)
    assert "\n" not in str(refused.value)


class Points:
    """Entry points in the place of installed packages'."""

    def __init__(self, monkeypatch, **points):
        self.points = [importlib.metadata.EntryPoint(*one, registry.GROUP) for one in points.items()]
        self.asked = 0
        monkeypatch.setattr(registry.metadata, "entry_points", self)

    def __call__(self, group):
        assert group == registry.GROUP
        self.asked += 1
        return self.points


def test_other_packages_name_methods_by_entry_points(folder, monkeypatch):
    write(folder / "package_a.py", "")
    write(folder / "package_b.py", '@methods.register("named")')
    (folder / "package_d.py").write_text("number = 1\n")
    monkeypatch.syspath_prepend(folder)
    Points(monkeypatch, empty="package_d", number="package_d:number")
    for name, message in (
        ("empty", "'empty' of .* registers no method of that name; write module:Class"),
        ("number", "'package_d:number' is a int; expected a class"),
    ):
        with pytest.raises(LVLMError, match=message):
            as_method(name)
    own = {"raise": "package_a:Lift", "named": "package_b", "broken": "package_c:Lift", "cmac": "package_a:Lift"}
    points = Points(monkeypatch, **own)
    assert type(as_method("cmac")) is methods.CMAC and points.asked == 0  # nothing is imported for our own
    assert float(as_method("raise:delta=2").delta) == 2
    assert "named" not in registry.known()
    with pytest.warns(UserWarning, match="method 'broken' of .* cannot be imported: ModuleNotFoundError") as warned:
        assert set(methods.names()) >= {"raise", "named", "cmac"} and "broken" not in methods.names()
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    with pytest.raises(LVLMError, match="method 'broken' of .* cannot be imported"):
        as_method("broken")
    assert methods.get("cmac") is methods.CMAC


def test_a_module_that_is_reloaded_or_has_two_names_keeps_its_methods(folder, monkeypatch):
    write(folder / "twice.py")
    monkeypatch.syspath_prepend(folder)
    first = as_method("lift" if "lift" in registry.known() else "twice.py:Lift")
    importlib.reload(importlib.import_module("twice"))
    assert type(as_method("lift")) is not type(first)
    spec = importlib.util.spec_from_file_location("another_name", folder / "twice.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert methods.get("lift").__module__ == "another_name"
    write(folder / "other.py")
    with pytest.raises(LVLMError, match="the name 'lift' belongs to another_name.Lift; give other.Lift another one"):
        as_method("other.py:Lift")
    for delta in (1.0, 2.0):  # a cell of a notebook may run again
        cell = textwrap.dedent(LIFT.format(decorator='@methods.register("cell")')).replace("0.5", str(delta))
        exec(compile(cell, f"<cell {delta}>", "exec"), {"__name__": "__main__"})
        assert float(as_method("cell").delta) == delta


def define(body="pass", decorator='@methods.register("made")', base="methods.Method"):
    """Runs a class statement of the name Made."""
    names = {"__name__": "made", "methods": methods}
    exec(f"{decorator}\nclass Made({base}):\n" + textwrap.indent(textwrap.dedent(body), "    "), names)
    return names["Made"]


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (dict(decorator='@methods.register("cmac")'), "'cmac' belongs to lvlm_jax.methods.cmac.CMAC; give made.Made"),
        (dict(decorator="@methods.register"), r"register got 'Made'; expected a name .*@methods.register\(\"lift\"\)"),
        (dict(decorator='@methods.register("My Method")'), "register got 'My Method'; expected a name of lower-case"),
        (dict(decorator='@methods.register("none")'), "register got 'none'"),
        (dict(base="object"), r"made.Made is not a method; write class Made\(methods.Method\)"),
        (dict(body="def logit(self, site, logits): ..."), "Made has logit, which nothing calls; name it logits if"),
        (dict(body="def weight(self, site, weights): ..."), "name it weights if"),
        (dict(body="def value(self, site, weights, mix): ..."), "name it values if .* or _value if it is a helper"),
        (dict(body="def wieghts(self, site, weights): ..."), "name it weights if"),
        (dict(body="def masks(self, site, mask): ..."), "name it mask if"),
        (dict(body="def branch(self): ..."), "name it branches if"),
        (dict(body="def contrast_promt(self): ..."), "name it contrast_prompt if"),
        (dict(body="presets = {}"), "name it PRESETS if"),
        (dict(body="row = 'last'"), "name it rows if"),
        (dict(body="rows = 'first'"), "rows is 'first'; expected one of 'all', 'post_image', 'last'"),
        (dict(body="rows = None"), "rows is None; expected one of"),
        (dict(body="rows: str = methods.switch('some', 'rows')"), "rows is 'some'; expected one of"),
        (dict(body="delta: float = 0.5"), "the field delta has no description; write delta = methods.strength"),
        (dict(body="delta = methods.strength(0.5, 'delta')"), "'delta' is a field but has no type annotation"),
        (dict(body="sizes: list = methods.switch([1], 'sizes')"), "mutable default"),
        (dict(body="weights: float = methods.strength(1, 'w')"), "the field weights has the name of a stage or hook"),
        (
            dict(body="layers: tuple = methods.switch((1,), 'layers')\ndef mask(self, site, mask): ..."),
            "its field layers hides the method layers",
        ),
        (
            dict(decorator='@methods.register("made")\n@__import__("dataclasses").dataclass'),
            "Made is a mutable dataclass; leave @dataclass out",
        ),
    ],
)  # fmt: skip
def test_a_slip_in_a_definition_is_refused_where_it_stands(folder, definition, message):
    with pytest.raises(LVLMError, match=message) as refused:
        define(**definition)
    assert "\n" not in str(refused.value) and "made" not in registry.known()


def test_helpers_may_have_names_of_their_own(folder):
    """A method may define these names, although they resemble names of the protocol."""
    made = define("""
        weight: float = methods.strength(1.0, "of the exits")
        masked = mass = edited = gains = candidates = lambda self: 1
        _logit = _weight = 1
        rows = "last"
    """)
    assert made().mass() == 1


def test_what_is_no_registered_method_says_what_to_write(folder, model, mixed):
    noise = define("def contrast_prompt(self): return 'noise'\ndef branches(self): return (None, None)")
    for make, message in (
        (lambda: as_method(methods.CMAC), r"CMAC is a class; write CMAC\(\)"),
        (lambda: as_method(3), r"method is 3; expected a method such as .* its name such as 'cmac', or None"),
        (lambda: as_method([methods.CMAC(), methods.EAH()]), "methods.chain joins several"),
        (define(decorator=""), r'Made is not registered; write @methods.register\("name"\) above the class'),
        (lambda: as_method(define(decorator="", base="methods.EAH")()), r'write @methods.register\("made"\) above the'),
        (lambda: model.prefill(mixed, noise()), r"contrast_prompt\(\) is 'noise'; expected one of 'same', 'pixels'"),
    ):
        with pytest.raises(LVLMError, match=message):
            make()
