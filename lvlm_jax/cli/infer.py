"""Ask a vision-language model about images, with and without a hallucination-mitigation method.

See `lvlm infer --help`; the defaults are in `configs/infer.py`.
"""

import pathlib
import time

from lvlm_jax import LVLM, config_files
from lvlm_jax.analysis import overlay
from lvlm_jax.cli import common, demo, habits
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import jobs, scheduler
from lvlm_jax.generation.defaults import CHOICES
from lvlm_jax.generation.questions import conversation, system_prompt
from lvlm_jax.journal import record
from lvlm_jax.methods import parse
from lvlm_jax.pocket import splits
from lvlm_jax.processors.images import open_image
from lvlm_jax.processors.templates import check_system
from lvlm_jax.weights import names, smol
from lvlm_jax.weights.quantize import QUANTS

EXAMPLES = """\
examples:
  lvlm infer
      the demo: the model inside the package describes a sample image and answers questions about it, greedily and
      with VCD, and draws where it looked; if smol is installed (docs/smol.md), smol does this, and shows one
      description that a method fixes and one that it breaks, with how often each happens
  lvlm infer --model llava-1.5-7b-hf --image a.jpg --prompt "What is on the table?" --method cmac --alpha 3
  lvlm infer --model llava-1.5-7b-hf --image a.jpg --image b.jpg --prompt "<image> <image> What changed?"
  lvlm infer --model-path llava-1.5-7b-hf --question-file coco_pope_random.json --image-folder val2014 \\
      --answers-file answers.jsonl --method cmac --max-new-tokens 10
      the file has one JSON object a line, {"question_id", "image", "text"}; after a stop, the same command resumes

methods (none, or one of these); their settings, with defaults, are flags once --method names the method:
"""


def command_line(words: list[str]):
    """Parses the command line. Defaults come from the config; without images and questions, the result is the demo.

    `method` is the method itself, or None.
    """
    # The config has the defaults, and the method's fields become flags, so both are parsed first.
    absent = dict.fromkeys(("image", "prompt", "question_file", "answers_file"))
    chosen = common.ahead(words, config="infer", method=None, model=None, model_path=None, **absent)
    defaults = config_files.load_config(chosen.config)
    alone = not any(getattr(chosen, name) for name in absent)
    if alone and not (chosen.model or chosen.model_path) and defaults.model_path == "pocket" and smol.is_installed():
        defaults.model_path = "smol"

    parser = common.Parser(
        prog="lvlm infer", description=__doc__.split("\n")[0], epilog=EXAMPLES + parse.methods_help()
    )
    add = common.flags(parser, defaults)
    add("--config", metavar="FILE", help="file with the defaults, a changed copy of configs/infer.py")
    add(
        "--model-path",
        "--model",
        metavar="PATH",
        help="checkpoint folder or hub id; pocket: the model inside the package; smol: see docs/smol.md",
    )
    add("--adapter", metavar="PATH", help="PEFT LoRA adapter of that checkpoint, a folder or hub id")
    add("--dtype", choices=names.NUMBER_TYPES, help="auto: float32 on a CPU, else bfloat16")
    add("--quant", choices=("none", *QUANTS), help="int8: keep the decoder's weights as 8-bit integers")
    add(
        "--system",
        metavar="TEXT|vicuna|none",
        help="system prompt: a text, Vicuna's sentence (which LLaVA-1.5's authors send), or none",
    )
    add("--method", metavar="NAME", help="none, or a method from the list below; several joined by +")

    add("--allow-urls", action="store_true", help="download images given as http or https addresses")

    add = common.flags(parser, defaults, "one or more questions about the same images")
    add("--image", action="append", metavar="FILE", help="an image, or the address of one; repeat it for several")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a question, with <image> at the place of each image (without it, images come first); repeat it for "
        "several",
    )
    add("--compare", action=parse.Switch, help="with a method: also answer without it")
    add("--stream", action="store_true", help="print the answer while it is written")
    add(
        "--attention-map",
        metavar="FILE",
        help="draw where the model looked during the answers to the first question, as PNG",
    )

    add = common.flags(parser, defaults, "a file of questions")
    add(
        "--question-file",
        metavar="FILE",
        help="JSON lines {question_id, image, text}; image: a name, an address, or a list",
    )
    add("--image-folder", metavar="FOLDER", help="folder of those images")
    add("--answers-file", metavar="FILE", help="JSON lines {question_id, prompt, text, model_id, image, metadata}")
    add("--batch-size", type=common.number(int, low=1), metavar="N", help="batch size")
    add(
        "--schedule",
        choices=scheduler.SCHEDULES,
        help="continuous: when an answer ends, the next question starts; batches: whole batches; auto: continuous if "
        "answers may be long and the method allows it",
    )

    add = common.flags(parser, defaults, "generation")
    add("--temperature", type=common.number(float, low=0), metavar="T", help="0: always the most probable token")
    add(
        "--top-p",
        type=common.number(float, above=0, high=1),
        metavar="P",
        help="sample from the fewest tokens that reach this probability",
    )
    add("--top-k", type=common.number(int, low=0), metavar="K", help="sample from this many tokens; 0: from all")
    add(
        "--repetition-penalty",
        type=common.number(float, above=0),
        metavar="R",
        help="divides the logits of tokens that occurred before; 1: off",
    )
    add(
        "--generation-config",
        choices=CHOICES,
        help="checkpoint: settings at their defaults come from the checkpoint's generation_config.json",
    )
    add("--max-new-tokens", type=common.number(int, low=1), metavar="N", help="longest answer")
    add("--seed", type=common.number(int, low=0), metavar="N", help="seed of sampling")
    name = chosen.method or (defaults.demo.method if alone else defaults.method)
    common.method_flags(parser, name)
    arguments = parser.parse_args(words)
    arguments.method = parse.build_method(name, arguments)
    examples = defaults.demo.examples
    arguments.examples = examples if alone and arguments.model_path == "smol" and examples.images else None
    arguments.there = arguments.note = None
    if alone:
        arguments.there = splits.demo_scene().counts  # the objects of the sample image
        arguments.note = defaults.demo.get("note") if arguments.model_path == "pocket" else None
        arguments.image = [str(names.pocket_file("sample.png"))]
        arguments.prompt = list(defaults.demo.prompts)
        if not arguments.stream:
            arguments.attention_map = arguments.attention_map or defaults.demo.attention_map
    return arguments


def settings(arguments) -> dict:
    """The generation flags as arguments of `LVLM.generate` and as the record of a job."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    return {name: getattr(arguments, name) for name in names}


def load(arguments) -> LVLM:
    """Loads the model that the command line names.

    Raises:
        LVLMError: it cannot be loaded, or its chat template has no place for a system prompt.
    """
    model = LVLM.from_pretrained(
        arguments.model_path,
        dtype=arguments.dtype,
        adapter=arguments.adapter,
        quant=names.quant(arguments.quant),
        generation_config=arguments.generation_config,
        allow_urls=arguments.allow_urls,
    )
    check_system(model.processor, system_prompt(arguments.system))
    return model


def job(arguments) -> int:
    """Answers a file of questions; the exit code is 2 if one of them failed."""
    if not arguments.answers_file:
        raise LVLMError("--question-file needs a file for the answers; give --answers-file FILE")
    if not arguments.question_file:
        raise LVLMError("--answers-file needs a file of questions; give --question-file FILE")
    if arguments.image or arguments.prompt or arguments.attention_map or arguments.stream:
        raise LVLMError(
            "--image, --prompt, --stream and --attention-map cannot be used with --question-file; leave them out"
        )

    streams = scheduler.use_continuous(
        arguments.schedule, arguments.method, None, arguments.max_new_tokens, arguments.batch_size
    )
    options = {"method": arguments.method} | settings(arguments)

    def load_answers():
        model = load(arguments)
        if streams:
            return jobs.streamer(model, arguments.batch_size, **options)
        return jobs.answerer(model, **options)

    start = time.monotonic()
    summary = jobs.run_job(
        load_answers,
        arguments.question_file,
        arguments.answers_file,
        record.run_record(
            names.checkpoint(arguments.model_path),
            names.precision(names.dtype(arguments.dtype), names.quant(arguments.quant)),
            arguments.method,
            settings(arguments) | {"generation_config": arguments.generation_config},
        )
        | record.adapter_record(arguments.adapter),
        image_folder=arguments.image_folder,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        model_id=pathlib.Path(arguments.model_path).name,
        streams=streams,
        system=system_prompt(arguments.system),
        allow_urls=arguments.allow_urls,
    )
    print(
        f"{arguments.answers_file}: {summary.before} answered before, {summary.now} now, "
        f"{len(summary.failures)} failed, {time.monotonic() - start:.1f} s"
    )
    return 2 if summary.failures else 0


def ask(arguments) -> int:
    """Answers questions about the same images, without and with the method, and prints the answers."""
    if not arguments.prompt:
        raise LVLMError('nothing to ask; give --prompt "…"')
    if arguments.attention_map and arguments.stream:
        raise LVLMError("--attention-map cannot be used with --stream; leave one of them out")
    if arguments.attention_map and not arguments.image:
        raise LVLMError("--attention-map needs an image; give --image")
    images = [open_image(path, arguments.allow_urls) for path in arguments.image]
    system = system_prompt(arguments.system)
    conversations = [conversation(images, text, system) for text in arguments.prompt]
    methods = {}
    if arguments.method is None or arguments.compare:
        methods["greedy" if arguments.temperature == 0 else "plain"] = None
    if arguments.method is not None:
        methods[arguments.method.label] = arguments.method
    width = max(map(len, methods))
    indent = "\n" + " " * (width + 4)  # indent of an answer's further lines
    options = settings(arguments) | {"seed": arguments.seed}

    model = load(arguments)
    print(f"model: {arguments.model_path}; pictures: {', '.join(arguments.image) or 'none'}")
    if arguments.there is not None:
        print(f"in the picture: {', '.join(arguments.there)}")
    if arguments.stream:
        for text, messages in zip(arguments.prompt, conversations, strict=True):
            print(f"\n{text}")
            for name, method in methods.items():
                print(f"  {name:{width}}  ", end="", flush=True)
                for piece in model.stream(messages, method=method, **options):
                    print(piece.replace("\n", indent), end="", flush=True)
                print()
        return 0
    outputs = {name: model.generate(conversations, method=method, **options) for name, method in methods.items()}
    for index, text in enumerate(arguments.prompt):
        print(f"\n{text}")
        for name, output in outputs.items():
            answer = output.text[index]
            answer = answer if arguments.there is None else demo.marked(answer, arguments.there)
            print(f"  {name:{width}}  {answer}".replace("\n", indent))
    if arguments.attention_map:
        rows = []
        for name, output in outputs.items():
            rows += overlay.rows_of(model, name, images, conversations[0], output.tokens[0], methods[name])
        overlay.draw(arguments.attention_map, rows)
        print(f"\nwhere the model looked during each answer to the first question: {arguments.attention_map}")
    if arguments.note:
        print(f"\n{arguments.note}")
    if arguments.examples:
        demo.show(model, arguments.examples, arguments.max_new_tokens)
    return 0


def main(words: list[str]) -> int:
    """Parses the command line and runs it."""
    arguments = command_line(habits.translated(words, habits.SAME, habits.INFER_ANSWERS))
    return job(arguments) if arguments.question_file or arguments.answers_file else ask(arguments)
