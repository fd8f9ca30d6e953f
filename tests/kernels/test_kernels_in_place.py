"""Our Triton kernels do not write where they read, but for the pointers listed here.

The warps of a Triton program run one after another, and each may hold a copy of a small tensor. A warp that reads late
then reads what another one has written already. Nothing reports this, and a small tensor on an idle GPU looks right.
"""

import ast

import pytest
from helpers.paths import ROOT

# Kernel -> pointers that it may write after it has read them, because each value is read and written by one thread:
# the tile has more values than the program has threads. ``_decode`` reads every place but the one that it writes.
ALLOWED = {"gradient": {"s_ptr"}, "_join": {"out_ptr"}, "_decode": {"cache_ptr"}}
KERNELS = [
    (path.name, node)
    for path in sorted((ROOT / "hylo_megatron").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
]


def pointer(place: ast.expr, made: dict[str, ast.expr]) -> str:
    """Return the pointer of a sum such as ``x_ptr + row * stride``, through the variables that hold such sums."""
    while not (isinstance(place, ast.Name) and place.id.endswith("_ptr")):
        place = made[place.id] if isinstance(place, ast.Name) else place.left
    return place.id


def in_place(kernel: ast.FunctionDef) -> set[str]:
    """Return the pointers at which ``kernel`` both loads and stores."""
    made, used = {}, {"load": set(), "store": set()}
    for node in ast.walk(kernel):
        if isinstance(node, ast.Assign):
            several = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
            pairs = (
                zip(node.targets[0].elts, node.value.elts, strict=True) if several else [(node.targets[0], node.value)]
            )
            made |= {name.id: value for name, value in pairs if isinstance(name, ast.Name)}
    for node in ast.walk(kernel):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
            used[node.func.attr].add(pointer(node.args[0], made))
    return used["load"] & used["store"]


@pytest.mark.parametrize("file, kernel", KERNELS, ids=[f"{file}:{node.name}" for file, node in KERNELS])
def test_a_kernel_writes_where_it_reads_only_if_listed(file, kernel):
    assert in_place(kernel) == ALLOWED.get(kernel.name, set())


def test_the_join_that_wrote_its_denominators_in_place_is_found():
    kernel = ast.parse("""
def _join(out_ptr, lse_ptr, stride):
    at, new_at = lse_ptr + tl.program_id(0) * stride + s, out_ptr + s
    tl.store(at, tl.load(at) + tl.load(new_at))
""").body[0]
    assert in_place(kernel) == {"lse_ptr"} and len(KERNELS) > 10
