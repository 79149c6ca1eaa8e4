"""CHAIR's ground truth: the objects of each image, from COCO annotations or from a `chair.pkl`."""

import io
import pickle
import pickletools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import folders
from lvlm_jax.evaluation.chair_words import Lexicon, parse_synonyms, plain_lexicon
from lvlm_jax.evaluation.question import Data

PLACES = (".", "annotations", "coco/annotations", "COCO_2014/annotations", "COCO/annotations",
          "annotations_trainval2014/annotations")  # fmt: skip


# All classes in a pickled CHAIR scorer; each only stores values.
_SAFE = {
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "list"): list,
    ("builtins", "dict"): dict,
    ("builtins", "object"): object,
}
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_SCORER_MODULES = ("__main__", "chair", "utils.chair")


# The opcodes for dicts, lists, sets and texts in every pickle protocol.
_OPCODES = frozenset(
    (
        "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD EMPTY_TUPLE TUPLE TUPLE1 TUPLE3 NONE "
        "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_SET ADDITEMS FROZENSET "
        "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 STRING BINSTRING SHORT_BINSTRING INT BININT BININT1 BININT2 "
        "LONG LONG1 LONG4 NEWTRUE NEWFALSE PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET"
    ).split()
)
_STORES = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
_TUPLES = frozenset(("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE3"))


def _walk(content: bytes) -> None:
    """Reads the opcodes of a pickle without executing them, and refuses files that would take much time or memory.

    A high memo index makes the unpickler allocate a table of that size. Nested tuples, each with the previous one
    twice, take 2^depth steps to hash; here tuples may only be the arguments of a call that follows. Numbers of more
    than 64 bits take long to read and to hash.

    Raises:
        LVLMError: the pickle contains one of these, or an opcode that no scorer needs.
        ValueError: it is malformed.
    """
    arguments = None
    for opcode, value, place in pickletools.genops(content):
        name = opcode.name
        if name not in _OPCODES:
            raise LVLMError(f"it uses the opcode {name}, so it holds no CHAIR scorer")
        if name in _STORES:
            if value is not None and value > place:
                raise LVLMError(f"it stores an object as number {value} after {place} bytes, which wastes memory")
            continue
        if arguments and name != "REDUCE" and (name, arguments) != ("NEWOBJ", "EMPTY_TUPLE"):
            raise LVLMError("it holds a tuple that is not the arguments of a call, which no CHAIR scorer needs")
        arguments = name if name in _TUPLES else None
        if isinstance(value, int) and value.bit_length() > 64:
            raise LVLMError(f"it holds a number of {value.bit_length()} bits, which no CHAIR scorer needs")
        if name == "FRAME" and value > len(content):
            raise ValueError("a frame is longer than the file")


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves only the names in `_SAFE`, so that no opcode (GLOBAL, STACK_GLOBAL, INST, EXT) can reach a function
    to call."""

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        # Replaces the scorer object: it has the attributes and no behaviour. One class per file, because a pickle can
        # set attributes on it.
        self.scorer = type("Scorer", (), {})

    def find_class(self, module: str, name: str):
        module = _OLD_NAMES.get(module, module)
        if (module, name) in _SAFE:
            return _SAFE[module, name]
        if (module, name) == ("copyreg", "_reconstructor"):
            return self._reconstruct
        if name == "CHAIR" and module in _SCORER_MODULES:
            return self.scorer
        raise LVLMError(f"it asks for {module}.{name}, which no CHAIR scorer needs and which may do harm")

    def _reconstruct(self, kind: type, base: type, state):
        """Does the work of `copyreg._reconstructor`, for the replacement class alone."""
        if kind is not self.scorer or base is not object:
            raise LVLMError("it builds an object that no CHAIR scorer has")
        return self.scorer()

    def persistent_load(self, key):
        raise LVLMError("it refers to objects outside of itself")


def read_chair_pickle(path: Path) -> tuple[dict[int, frozenset[str]], Lexicon]:
    """Objects by image id, and the word lists, from a `chair.pkl`.

    Raises:
        LVLMError: the file is not a pickle, contains something else, or needs anything that could run code.
    """
    content = files.read_bytes(path, "pickle")
    advice = "give COCO annotations and a synonym list instead"
    try:
        _walk(content)
        unpickler = _RestrictedUnpickler(content)
        scorer = unpickler.load()
    except LVLMError as error:
        raise LVLMError(f"pickle {str(path)!r} is refused: {error}; {advice}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise LVLMError(f"pickle {str(path)!r} is damaged or no pickle ({type(error).__name__}); {advice}") from error
    state = scorer.__dict__ if isinstance(scorer, unpickler.scorer) else scorer
    try:
        distinct: dict[int, frozenset[str]] = {}  # a file may give the same long list to many images
        objects = {}
        for image, names in state["imid_to_objects"].items():
            if id(names) not in distinct:
                distinct[id(names)] = frozenset(map(_word, names))
            objects[int(image)] = distinct[id(names)]
        categories = {_word(k): _word(v) for k, v in state["inverse_synonym_dict"].items() if k}
        double_words = {_word(k): _word(v) for k, v in state["double_word_dict"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LVLMError(
            f"pickle {str(path)!r} holds no CHAIR scorer (imid_to_objects, inverse_synonym_dict, double_word_dict)"
        ) from error
    if not objects:
        raise LVLMError(f"pickle {str(path)!r} names no image; {advice}")
    return objects, Lexicon(categories, double_words, path.name)


def _word(value) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def annotation_files(data: Data) -> dict[str, list[Path]]:
    """COCO's files of instances and captions: those of 2014 if there are any, else all."""
    folder = folders.data_folder(data)
    for place in PLACES:
        by_kind = {
            kind: sorted((folder / place).glob(f"{kind}_*2014.json")) or sorted((folder / place).glob(f"{kind}_*.json"))
            for kind in ("instances", "captions")
        }
        if all(by_kind.values()):
            return by_kind
        if any(by_kind.values()):
            kind = next(kind for kind, paths in by_kind.items() if not paths)
            raise LVLMError(f"CHAIR needs {kind}_val2014.json too; it is missing in {str(folder / place)!r}")
    raise LVLMError(
        f"CHAIR's ground truth is missing: no instances_val2014.json and captions_val2014.json in "
        f"{str(folder)!r} or its folder annotations; or give a chair.pkl"
    )


def lexicon_of(data: Data, synonym_list: str, categories: list[str]) -> Lexicon:
    """The user's synonym list, which must cover all categories; if there is none, the names of the categories."""
    if data.synonyms is None:
        return plain_lexicon(categories)
    path = files.existing_file(data.synonyms, "synonym list")
    lexicon = parse_synonyms(files.read_text(path, "synonym list"), synonym_list == "repaired", path.name)
    missing = [name for name in categories if name not in lexicon.categories]
    if missing:
        raise LVLMError(
            f"synonym list {str(path)!r} lacks {len(missing)} categories of the annotations, first {missing[0]!r}"
        )
    return lexicon


def read_annotations(
    data: Data, synonym_list: str, reading: str, image_ids: set[int] | None
) -> tuple[dict[int, tuple[str, frozenset[str]]], Lexicon]:
    """Image id -> (file name, objects of its instances and of its reference captions), and the lexicon.

    Args:
        reading: how the reference captions are read, see `chair_words`.
        image_ids: ids of the images to read; None for all images.

    Raises:
        LVLMError: files are missing or malformed, or the category of an annotation is not listed.
    """
    annotation_paths = annotation_files(data)
    contents = {path: _coco(path) for paths in annotation_paths.values() for path in paths}
    names: dict[int, str] = {}
    categories: dict[int, str] = {}
    for path in annotation_paths["instances"]:
        for row in contents[path].get("categories", []):
            where = f"a category of {str(path)!r}"
            categories[files.field(row, ["id"], int, where)] = files.field(row, ["name"], str, where)
        for row in contents[path].get("images", []):
            where = f"an image of {str(path)!r}"
            names[files.field(row, ["id"], int, where)] = files.field(row, ["file_name"], str, where)
    if not names or not categories:
        raise LVLMError(f"annotations {str(annotation_paths['instances'][0])!r} list no images or no categories")
    lexicon = lexicon_of(data, synonym_list, list(categories.values()))
    objects: dict[int, set[str]] = {image: set() for image in names if image_ids is None or image in image_ids}
    for path in annotation_paths["instances"]:
        for row in contents[path]["annotations"]:
            image = files.field(row, ["image_id"], int, f"an annotation of {str(path)!r}")
            where = f"annotation {row.get('id')} (image {image}) of {str(path)!r}"
            category = files.field(row, ["category_id"], int, where)
            if category not in categories:
                raise LVLMError(f"{where}: category_id {category} is not among the categories")
            if image in objects:
                objects[image].add(lexicon.categories[categories[category]])
    for path in annotation_paths["captions"]:
        for row in contents[path]["annotations"]:
            where = f"caption {row.get('id')} of {str(path)!r}"
            image = files.field(row, ["image_id"], int, where)
            if image in objects:
                caption = files.field(row, ["caption"], str, where)
                objects[image].update(name for _, name in lexicon.mentions(lexicon.words(caption, reading)))
    return {image: (names[image], frozenset(names_of_objects)) for image, names_of_objects in objects.items()}, lexicon


def _coco(path: Path) -> Mapping:
    content = files.read_json(path, "annotations")
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise LVLMError(f"annotations {str(path)!r} have no list 'annotations'; expected COCO's format")
    for name in ("annotations", "images", "categories"):
        rows = content.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise LVLMError(f"'{name}' of annotations {str(path)!r} is not a list of objects; expected COCO's format")
    return content
