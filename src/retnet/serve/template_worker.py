"""Renders a chat template in a process of its own: JSON lines in and out. It has little memory, and is killed when late.

It is run as a file, and imports nothing of this package.
"""

import json
import resource
import sys

from jinja2 import Template
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 << 20  # bytes of address space
LONGEST = 16 << 20  # characters of a text


class _RefusedError(Exception):
    """A template's own `raise_exception`."""


def _refuse(message: object) -> None:
    raise _RefusedError(str(message))


def _as_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _answer(template: Template, variables: dict[str, object]) -> dict[str, str]:
    try:
        text = template.render(**variables)
    except MemoryError:
        return {"error": "the chat template takes too much memory for these messages"}
    except RecursionError:
        return {"error": "the chat template calls itself too often"}
    except _RefusedError as error:
        return {"error": f"the chat template refuses these messages: {str(error)[:300]}"}
    except Exception as error:
        return {
            "error": f"the chat template fails on these messages: {type(error).__name__}: {str(error)[:300]}"
        }
    if len(text) > LONGEST:
        return {"error": f"the chat template made {len(text):,} characters; allowed are {LONGEST:,}"}
    return {"text": text}


def main() -> None:
    """First line: the template; each further one: the variables of a rendering."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    try:
        template = environment.from_string(json.loads(sys.stdin.readline()))
    except Exception as error:
        print(json.dumps({"error": f"the chat template cannot be read: {str(error)[:300]}"}), flush=True)
        return
    print(json.dumps({"text": ""}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(template, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
