"""The program of the process that renders chat templates: reads a JSON object per line, and writes another in reply.

`rendering.py` starts it; nothing imports it. A template comes with a checkpoint, and even a short one may take hours or
all memory (`{{ 9 ** 9 ** 9 }}`), also while it is compiled. Nothing of this package is imported here.
"""

import json
import signal
import sys

SECONDS, MEGABYTES, LETTERS = (int(word) for word in sys.argv[1:4])


def limit_memory() -> None:
    """Limits this process to `MEGABYTES` more memory than it uses now, if the system supports that."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (resident + (MEGABYTES << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass


def limit_time(seconds: int) -> None:
    """Ends this process after `seconds` of CPU time, whatever it does; 0 removes the limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(request: dict) -> dict:
    """The reply to a request, as JSON values.

    It is `{"text"}`, the rendered conversation; `{"limit"}`, the limit that is exceeded; or the template's exception,
    `{"sort", "name", "message"}`, with the `line` of a syntax error.
    """
    try:
        (text,), _ = render_jinja_template(conversations=[request["messages"]], **request["options"])
        return {"text": text} if len(text) <= LETTERS else {"limit": "letters"}
    except MemoryError:
        return {"limit": "memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"sort": "syntax", "name": type(error).__name__, "message": message_of(error), "line": error.lineno}
    except BaseException as error:  # a template may raise anything
        sort = "refusal" if type(error) is jinja2.TemplateError else "template"
        sort = sort if isinstance(error, jinja2.TemplateError) else "other"
        return {"sort": sort, "name": type(error).__name__, "message": message_of(error)}


def message_of(error: BaseException) -> str:
    """The message of an exception; only its beginning will be shown."""
    return str(error)[:1000]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
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
