"""Serve a model to OpenAI clients; each request chooses a method and its strengths. Includes a page to try it.

    lvlm serve --model pocket --methods cmac,vcd
    lvlm serve --model llava-1.5-7b-hf --alias careful=cmac:alpha=3 --alias mine=my_file.py:Mine --key-file key.txt

A request names a method as `"method": "cmac", "method_settings": {"alpha": 3}`, or in the model's name:
`"model": "pocket+cmac:alpha=3"`. See docs/serving.md.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from lvlm_jax import LVLM, files
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.defaults import CHOICES
from lvlm_jax.methods import parse
from lvlm_jax.weights import names
from lvlm_jax.weights.quantize import QUANTS

KEY = "LVLM_SERVE_KEY"  # environment variable for the key


def build_parser(limits: Any) -> common.Parser:
    """The flags, among them one for each field of `Limits`."""
    parser = common.Parser(prog="lvlm serve", description=__doc__, epilog="methods:\n" + parse.methods_help())
    add = parser.add_argument
    add("--model-path", "--model", default="pocket", metavar="PATH",
        help="checkpoint folder or hub id; pocket: the model inside the package (default pocket)")  # fmt: skip
    add("--name", metavar="NAME", help="the model's name for clients (default: the last part of --model)")
    add("--adapter", metavar="PATH", help="PEFT LoRA adapter of that checkpoint, a folder or hub id")
    add("--dtype", default="auto", choices=names.NUMBER_TYPES, help="auto: float32 on a CPU, else bfloat16")
    add("--quant", default="none", choices=("none", *QUANTS), help="int8: keep the decoder's weights as 8-bit integers")
    add("--generation-config", default="plain", choices=CHOICES,
        help="checkpoint: settings that a request leaves out come from the checkpoint's "
        "generation_config.json")  # fmt: skip
    add("--methods", default="none", metavar="LIST",
        help="methods, separated by commas, that are compiled before the server is ready, like those of "
        "aliases; others are compiled at their first request (default none: only plain decoding)")  # fmt: skip
    add("--alias", action="append", default=[], metavar="NAME=METHOD",
        help="a name for the model with a method; may be repeated")  # fmt: skip
    add("--aliases-only", action="store_true", help="allow only plain decoding and the methods of aliases")
    where = parser.add_argument_group("address and access")
    where.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default 127.0.0.1)"
    )
    where.add_argument("--port", type=common.number(int, 0, 65535), default=8000, metavar="N",
                       help="0: any free port (default 8000)")  # fmt: skip
    where.add_argument("--server-name", action="append", default=[], metavar="NAME",
                       help="a host name by which clients reach a server on 127.0.0.1, for example "
                       "behind a proxy; may be repeated")  # fmt: skip
    where.add_argument("--key-file", type=Path, metavar="FILE",
                       help=f"file whose first line is the key that clients must send (or set {KEY})")  # fmt: skip
    where.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                       help="host from which images may be downloaded; may be repeated (default: only "
                       "data URIs)")  # fmt: skip
    where.add_argument("--state", type=Path, metavar="DIR", help="folder for /v1/files and /v1/batches")
    bounds = parser.add_argument_group("limits")
    for field in dataclasses.fields(limits):
        kind = type(field.default)
        bounds.add_argument(f"--{field.name.replace('_', '-')}", type=common.number(kind, field.metadata["low"]),
                            default=field.default, metavar="N",
                            help=f"{field.metadata['doc']} (default {field.default:,})")  # fmt: skip
    return parser


def aliases(texts: list[str]) -> dict[str, str]:
    """The operator's aliases: name -> text of the method.

    Raises:
        LVLMError: an alias is not NAME=METHOD.
    """
    by_name = {}
    for one in texts:
        name, equals, words = one.partition("=")
        if not (name and equals and words):
            raise LVLMError(f"--alias is {one!r}; expected NAME=METHOD, as in careful=cmac:alpha=3")
        by_name[name] = words
    return by_name


def key(file: Path | None) -> str | None:
    """The key that clients must send; None if the server is open to everybody.

    Raises:
        LVLMError: the file is unreadable or empty.
    """
    if file is None:
        return os.environ.get(KEY) or None
    lines = files.read_bytes(file, "key file").decode("utf-8", "replace").split("\n")
    if not lines[0].strip():
        raise LVLMError(f"key file {str(file)!r} has no key in its first line")
    return lines[0].strip()


def main(words: list[str]) -> int:
    """Loads the model and runs the server."""
    try:
        from lvlm_jax.serving.limits import Limits
        from lvlm_jax.serving.run import serve
        from lvlm_jax.serving.service import Service
    except ImportError as error:
        raise LVLMError(f"the server needs {error.name}; pip install 'lvlm_jax[serve]'") from error
    flags = build_parser(Limits).parse_args(words)
    limits = Limits(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Limits)})
    secret, alias_methods = key(flags.key_file), aliases(flags.alias)
    methods = [parse.as_method(one) for one in _several(flags.methods)]
    model = LVLM.from_pretrained(
        names.checkpoint(flags.model_path),
        dtype=names.dtype(flags.dtype),
        adapter=flags.adapter,
        quant=names.quant(flags.quant),
        generation_config=flags.generation_config,
    )
    name = flags.name or Path(flags.model_path).name
    service = Service(
        model, name, limits, alias_methods, frozenset(map(str.lower, flags.allow_host)), flags.aliases_only
    )
    warm = [None, *methods, *service.catalogue.aliases.values()]
    server_names = [one.lower() for one in flags.server_name]
    return serve(service, warm, flags.host, flags.port, secret, flags.state, server_names)


def _several(text: str) -> list[str]:
    """Splits methods at commas; a comma before a setting (`name=`) or a number belongs to the method."""
    parts: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        if parts and ("=" in part.partition(":")[0] or part.replace(".", "").isdecimal()):
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    return parts
