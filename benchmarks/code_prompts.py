"""Prompts about code to train a code model's heads on: documented functions, to be completed.

python -m benchmarks.code_prompts --package sympy --package networkx --out FILE.jsonl
"""

import ast
import json
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

ASKED = (
    "Write the body of this Python function.\n\n```python\n{}\n```",
    "Implement the function below.\n```python\n{}\n```",
    "Here is a function without its body:\n\n{}\n\nAnswer with the finished function and nothing else.",
    "{}\n\nFinish this function and explain how it works.",
    "Can you write this function for me? Only code please.\n\n{}",
)
LONGEST = 1200
SKIPPED = frozenset({"site-packages", "idlelib", "test", "tests"})


def functions(source: str) -> Iterator[str]:
    """Yield signature and docstring of every documented function of a module."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and len(ast.get_docstring(node) or "") > 40:
            last = node.body[0].end_lineno
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : last]))
            if text.isascii() and len(text) <= LONGEST:
                yield text


def sources(packages: list[str]) -> Iterator[tuple[str, Path]]:
    """Yield name and path of every module of the standard library and of ``packages``, without their tests."""
    paths = sysconfig.get_paths()
    roots = [Path(paths["stdlib"]), *(Path(paths["purelib"]) / name for name in packages)]
    for root in roots:
        if not root.is_dir():
            raise SystemExit(f"no package of this name is installed: {root.name}")
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if SKIPPED.isdisjoint(inside.parts):
                yield f"{root.name}/{inside}", path


def main(
    out: Annotated[Path, typer.Option()],
    package: Annotated[list[str] | None, typer.Option(help="An installed package to read as well.")] = None,
    examples: Annotated[bool, typer.Option(help="Only functions that are no methods and show examples.")] = False,
) -> None:
    """Write one prompt for every documented function of this Python's standard library and of some packages."""
    found: dict[str, str] = {}
    for name, path in sources(package or []):
        try:
            for number, text in enumerate(functions(path.read_text(encoding="utf-8"))):
                if not examples or (">>>" in text and "(self" not in text):
                    found.setdefault(text, f"{name}:{number}")
        except (SyntaxError, UnicodeDecodeError):
            continue
    prompts = [
        {"id": where, "turns": [ASKED[n % len(ASKED)].format(text)]} for n, (text, where) in enumerate(found.items())
    ]
    random.Random(0).shuffle(prompts)  # so that the first so many are a mixture
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    print(f"{len(prompts)} prompts in {out}")


if __name__ == "__main__":
    typer.run(main)
