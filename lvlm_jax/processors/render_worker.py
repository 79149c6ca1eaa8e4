"""The program of the process in which chat templates are rendered: one JSON object a line in, one out.

Started by `rendering.py`, never imported: a template comes with a checkpoint, and what is a short text may take hours
or all memory (`{{ 9 ** 9 ** 9 }}`), also while it is compiled. Nothing of this package is imported here.
"""

import json
import signal
import sys

SECONDS, MEGABYTES, LETTERS = (int(word) for word in sys.argv[1:4])


def limit_memory() -> None:
    """Lets this process take so many megabytes more than it has, where the system can tell and limit that."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (MEGABYTES << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass


def limit_time(seconds: int) -> None:
    """Ends this process after so many seconds of work, whatever it does then; 0 takes the limit away."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(asked: dict) -> dict:
    """The text of a conversation, or what the template raises: its type, what it says and, if broken, the line."""
    try:
        (text,), _ = render_jinja_template(conversations=[asked["messages"]], **asked["options"])
        return {"text": text} if len(text) <= LETTERS else {"limit": "letters"}
    except MemoryError:
        return {"limit": "memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"raised": "syntax", "name": type(error).__name__, "said": said(error), "line": error.lineno}
    except BaseException as error:  # a template may raise anything
        kind = "refusal" if type(error) is jinja2.TemplateError else "template"
        kind = kind if isinstance(error, jinja2.TemplateError) else "other"
        return {"raised": kind, "name": type(error).__name__, "said": said(error)}


def said(error: BaseException) -> str:
    """What an exception says; only its beginning will be shown."""
    return str(error)[:1000]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the process that asks
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory()
    for line in sys.stdin.buffer:
        limit_time(SECONDS)
        try:
            reply = json.dumps(answer(json.loads(line)))
        except MemoryError:
            reply = json.dumps({"limit": "memory"})
        limit_time(0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()
