"""Names of kernels' arguments."""

import ast
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"
# Locals of the function that Triton 3.5 and 3.6 write for a launch: an argument of such a name gets
# their value.
TAKEN = {"params", "specialization", "options", "backend", "specialize_impl", "JITCallable"}


def test_no_argument_is_named_as_what_a_launch_uses() -> None:
    found = {}
    for path in KERNELS.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                found[path.stem, node.name] = {item.arg for item in node.args.args}
    assert len(found) > 20
    assert {place: names & TAKEN for place, names in found.items() if names & TAKEN} == {}
