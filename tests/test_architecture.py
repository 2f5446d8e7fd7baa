"""The rules of the house, read off the syntax trees: who imports whom, sizes, and where a pass lives."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("compiler", "models", "passes", "runtime")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).glob("**/*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

MAY_IMPORT = {
    "compiler": {"compiler", "models", "passes", "runtime"},
    "models": {"models", "runtime.isa"},
    "passes": {"passes", "runtime.isa"},
    "runtime": {"runtime"},
}
"""Rooms, and what their modules may import: whole rooms, or sub-rooms of them."""

STOREYS: dict[str, tuple[set[str], ...]] = {
    "runtime": ({"isa"}, {"kernels", "distributed"}, {"memory"}, {"optimizer"}, {"state_io"}, {""}),
    "passes": ({"program"}, {"patterns", "sharding", "splitting"}, {""}),
    "models": ({""}, {"recipe"}),
    "compiler": (
        {"parallel", "rates", "options", "lowering", "setup"},
        {"capture"},
        {"planner", "memory"},
        {"inspect"},
        {"programs"},
        {"weights"},
        {"session"},
        {"state", "adaptation"},
        {""},
        {"cli"},
    ),
}
"""The sub-rooms and modules of a room from the ground up; "" are all its other modules. Imports run downwards."""


LONGEST_MODULE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 6

# Each exception is a name and the reason for it.
LONGER_FUNCTIONS: dict[str, str] = {}
MORE_PARAMETERS: dict[str, str] = {
    "compiler/module.py:CompiledModule.optimizer": "what users call: each option is a keyword of its own",
    "models/functional.py:_routed": "stands in for torch's scaled_dot_product_attention and has its signature",
    "runtime/isa/attention.py:attention": "the one operator for every attention: three tensors and keyword options",
}
MAY_PRINT: dict[str, str] = {}
PRIVATE_TORCH: dict[str, str] = {
    "runtime/isa/torch_private.py": "the one place for it, guarded by a version check",
}
TOUCH_META: dict[str, str] = {
    "passes/program/program.py": "owns the annotations of nodes",
    "compiler/capture/to_program.py": "reads what torch's tracer leaves, and makes notes of it",
    "compiler/capture/numbers.py": "reads what torch's tracer leaves of numbers",
    "runtime/isa/torch_private.py": "sets what torch's tracer reads",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> tuple[str, ...]:
    """A file as its module's path: ("runtime", "isa", "mesh"); a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module(path): path for path in FILES}


def imports(path: Path) -> list[tuple[ast.stmt, str]]:
    """Every import of a file as (statement, full dotted name of what is imported), relative ones resolved."""
    found: list[tuple[ast.stmt, str]] = []
    package = ["geminifx", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found_in = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node, f"{found_in}.{alias.name}") for alias in node.names]
    return found


def project_imports(path: Path) -> Iterator[tuple[ast.stmt, tuple[str, ...]]]:
    """Imports from this project: (statement, the module that is imported or imported from)."""
    for node, target in imports(path):
        parts = tuple(target.split("."))
        if parts[0] == "geminifx":
            yield node, parts[1:] if parts[1:] in MODULES else parts[1:-1]


def storey(target: tuple[str, ...]) -> int:
    """How high in its room a module stands."""
    storeys = STOREYS[target[0]]
    inner = target[1] if len(target) > 1 else ""
    return next(
        (i for i, names in enumerate(storeys) if inner in names), next(i for i, n in enumerate(storeys) if "" in n)
    )


def functions(path: Path) -> list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function of a file: (file:qualified name, its tree, whether it is a method)."""
    found = []

    def visit(node: ast.AST, scope: str, in_class: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((f"{name(path)}:{scope}{child.name}", child, in_class))
                visit(child, f"{scope}{child.name}.", False)
            elif isinstance(child, ast.ClassDef):
                visit(child, f"{scope}{child.name}.", True)
            else:
                visit(child, scope, in_class)

    visit(TREES[path], "", False)
    return found


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A command of the command line, whose options are its parameters, a line each."""
    return any(".command" in ast.unparse(decorator) for decorator in function.decorator_list)


# -- imports -----------------------------------------------------------------------------------------------


def test_imports_run_one_way_between_rooms():
    offences = [
        f"{name(path)}:{node.lineno} imports {'.'.join(target)}"
        for path in FILES
        for node, target in project_imports(path)
        if not {target[0], ".".join(target[:2])} & MAY_IMPORT[module(path)[0]]
    ]
    assert offences == []


def test_imports_run_downwards_inside_of_rooms():
    offences = [
        f"{name(path)}:{node.lineno} imports {'.'.join(target)}, which stands above it"
        for path in FILES
        for node, target in project_imports(path)
        if target[0] == module(path)[0] and storey(target) > storey(module(path)) and path.name != "__init__.py"
    ]
    assert offences == []


def test_every_storey_is_there():
    for room, storeys in STOREYS.items():
        inner = {parts[1] for parts in MODULES if parts[0] == room and len(parts) > 1}
        assert {named for names in storeys for named in names if named} <= inner


def test_no_module_imports_itself_by_way_of_others():
    graph = {module(path): {target for _, target in project_imports(path)} for path in FILES}
    packages = {parts for parts, path in MODULES.items() if path.name == "__init__.py"}
    try:
        TopologicalSorter({parts: targets - packages for parts, targets in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(".".join(parts) for parts in error.args[1]))


def test_the_ground_floor_knows_torch_and_itself_only():
    for path in FILES:
        if module(path)[:2] == ("runtime", "isa"):
            roots = {target.split(".")[0] for _, target in imports(path)} - set(sys.stdlib_module_names)
            assert roots <= {"torch", "geminifx"}, f"{name(path)} imports {roots}"
            assert all(target[:2] == ("runtime", "isa") for _, target in project_imports(path)), name(path)


def test_imports_inside_the_project_are_relative_and_stand_at_the_top():
    for path in FILES:
        for node, target in imports(path):
            root, relative = target.split(".")[0], isinstance(node, ast.ImportFrom) and node.level > 0
            assert relative or root not in ("geminifx", *ROOMS), f"{name(path)}:{node.lineno} imports {target}"
            inner = relative and node not in TREES[path].body
            assert not inner, f"{name(path)}:{node.lineno}: an import inside of something hides a cycle"
        assert "TYPE_CHECKING" not in path.read_text(encoding="utf-8"), name(path)


def test_a_pass_imports_no_other_pass():
    passes = {module(path) for path in pass_files()}
    for path in (path for path in FILES if module(path)[0] == "passes" and path.stem != "pipeline"):
        taken = {target for _, target in project_imports(path)} & passes - {module(path)}
        assert not taken, f"{name(path)} imports the pass {taken}"


def test_nobody_asks_a_store_or_a_format_which_it_is():
    """What differs between two stores of states is what their protocol is for."""
    for path in FILES:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass", "type"):
                named = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                asked = {"OwnStore", "TorchStore", "OwnFormat", "TorchFormat", "Machine"} & named
                assert not asked, f"{name(path)}:{node.lineno} asks whether something is a {asked}"


def test_context_managers_let_go_of_the_errors_that_they_tell():
    """See `as_cause`: a step's tensors would live on behind the error of a full device. Where models and files are
    read, and on the command line, there is no step."""
    found = []
    for path in FILES:
        if module(path)[:2] == ("compiler", "cli") or module(path)[0] == "models":
            continue
        for where, function, _ in functions(path):
            if any("contextmanager" in ast.unparse(decorator) for decorator in function.decorator_list):
                handlers = [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler)]
                raised = [node for handler in handlers for node in ast.walk(handler) if isinstance(node, ast.Raise)]
                found += [where for node in raised if node.exc and "as_cause(" not in ast.unparse(node.cause or node)]
    assert not found, f"raise from as_cause(error) in {sorted(set(found))}"


def test_private_torch_is_used_in_one_module():
    for path in FILES:
        private = [target for _, target in imports(path) if target.startswith("torch._")]
        reads = {ast.unparse(node) for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)}
        private += [text for text in reads if text.startswith("torch._") and not text.startswith("torch.__")]
        allowed = private == [] or name(path) in PRIVATE_TORCH
        assert allowed, f"{name(path)} reads {private}; put it into runtime/isa/torch_private.py"


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {".".join(["geminifx", *module(path)]) for path in FILES if path.name == "__init__.py"}
    assert set(settings["tool"]["setuptools"]["packages"]) == packages | {"geminifx"}


# -- sizes and manners -------------------------------------------------------------------------------------


def test_modules_are_short_and_say_what_they_are():
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST_MODULE, f"{name(path)} has {lines} lines"
        assert ast.get_docstring(TREES[path]), f"{name(path)} has no docstring"


def test_functions_are_short():
    for path in FILES:
        for qualified, function, _ in functions(path):
            length = function.end_lineno - function.lineno + 1
            allowed = length <= LONGEST_FUNCTION or is_command(function) or qualified in LONGER_FUNCTIONS
            assert allowed, f"{qualified} has {length} lines"


def test_functions_have_few_parameters():
    for path in FILES:
        for qualified, function, is_method in functions(path):
            taken = function.args
            static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
            count = len(taken.posonlyargs + taken.args + taken.kwonlyargs) - (is_method and not static)
            # An operator's kernels take what its schema says, and Triton's pointers and numbers: neither a dataclass.
            kernel = any(ast.unparse(d).startswith(("torch.library.", "_jit")) for d in function.decorator_list)
            few = count <= MOST_PARAMETERS or kernel or is_command(function)
            allowed = few or qualified in MORE_PARAMETERS
            assert allowed, f"{qualified} has {count} parameters; make them a dataclass"


def test_no_globals_no_printing():
    for path in FILES:
        for node in ast.walk(TREES[path]):
            assert not isinstance(node, ast.Global), f"{name(path)}:{node.lineno}: global"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print" or name(path) in MAY_PRINT, f"{name(path)}:{node.lineno}: print"


def test_only_the_program_and_capture_touch_meta():
    for path in FILES:
        keyed = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Subscript) and _is_meta(n.value)]
        called = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Attribute) and _is_meta(n.value)]
        used = [n.lineno for n in keyed + called if not (isinstance(n, ast.Attribute) and n.attr == "update")]
        assert used == [] or name(path) in TOUCH_META, f"{name(path)}: lines {used} read meta; use program.note"


def _is_meta(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "meta"


def test_exceptions_are_still_needed():
    known = {qualified for path in FILES for qualified, _, _ in functions(path)}
    assert set(LONGER_FUNCTIONS) | set(MORE_PARAMETERS) <= known
    assert set(MAY_PRINT) | set(PRIVATE_TORCH) | set(TOUCH_META) <= {name(path) for path in FILES}


# -- passes ------------------------------------------------------------------------------------------------


def pass_files() -> list[Path]:
    """The files of passes/ that declare a pass."""
    return [
        path
        for path in FILES
        if module(path)[0] == "passes"
        and any(
            isinstance(node, ast.FunctionDef)
            and any(ast.unparse(decorator).startswith("graph_pass(") for decorator in node.decorator_list)
            for node in TREES[path].body
        )
    ]


def test_the_room_of_passes_holds_passes_and_nothing_else():
    held = {path for path in FILES if path.parent == ROOT / "passes" and path.stem not in ("__init__", "pipeline")}
    assert held == set(pass_files())


def test_a_pass_file_shows_what_it_does_and_is_tested():
    for path in pass_files():
        text = ast.get_docstring(TREES[path]) or ""
        assert "before" in text and "after" in text, f"{name(path)}: show the program before and after in the docstring"
        declared = [
            node.name
            for node in TREES[path].body
            if isinstance(node, ast.FunctionDef) and any("graph_pass" in ast.unparse(d) for d in node.decorator_list)
        ]
        assert declared == [path.stem], f"{name(path)}: one pass, named like its file"
        assert (ROOT / "tests" / "passes" / f"test_{path.stem}.py").exists(), name(path)
        assert list((ROOT / "tests" / "golden").glob(f"{path.stem}_*.py")), name(path)
