"""The rules of the house, read off the syntax trees: who imports whom, sizes, and where a pass lives."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("compiler", "models", "passes", "runtime")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).glob("**/*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])

MAY_IMPORT = {
    "compiler": {"compiler", "models", "passes", "runtime"},
    "models": {"models", "runtime"},
    "passes": {"passes", "runtime"},
    "runtime": {"runtime"},
}
PASSES_SEE_OF_RUNTIME = {"ops", "linear_loss", "layout", "mesh", "errors", "units", "torch_private"}
"""Instruction schemas, plain data, fake tensors: a pass knows nothing of the machine."""

LONGEST_MODULE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 60, 6

# Each exception is a name and the reason for it.
LONGER_FUNCTIONS: dict[str, str] = {}
MORE_PARAMETERS: dict[str, str] = {
    "models/functional.py:_routed": "stands in for torch's scaled_dot_product_attention and has its signature",
    "runtime/attention.py:attention": "the one operator for every attention: three tensors and keyword options",
    "runtime/device_kernel.py:_adam": "Triton launches kernels with pointers and factors one by one",
    "runtime/device_kernel.py:_sgd": "likewise",
}
MAY_PRINT: dict[str, str] = {}
PRIVATE_TORCH: dict[str, str] = {
    "runtime/torch_private.py": "the one place for it, guarded by a version check",
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> list[tuple[ast.stmt, str]]:
    """Every import of a file as (statement, full dotted name of what is imported), relative ones resolved."""
    found: list[tuple[ast.stmt, str]] = []
    package = ["geminifx", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node, f"{module}.{alias.name}") for alias in node.names]
    return found


def project_imports(path: Path) -> list[tuple[ast.stmt, list[str]]]:
    """Imports from this project: (statement, [room, module, ...])."""
    dotted = [(node, target.split(".")) for node, target in imports(path)]
    return [(node, parts[1:]) for node, parts in dotted if parts[0] == "geminifx"]


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


@EVERY_FILE
def test_imports_run_one_way(path):
    for node, target in project_imports(path):
        assert target and target[0] in MAY_IMPORT[room(path)], f"{name(path)}:{node.lineno} imports {target}"


@EVERY_FILE
def test_imports_inside_the_project_are_relative(path):
    absolute = [target for _, target in imports(path) if target.split(".")[0] in ("geminifx", *ROOMS)]
    statements = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom) and node.level]
    assert len(absolute) == sum(len(node.names) for node in statements), absolute


@EVERY_FILE
def test_project_imports_stand_at_the_top(path):
    top = set(TREES[path].body)
    inner = [node.lineno for node, _ in project_imports(path) if node not in top]
    assert inner == [], f"{name(path)}: lines {inner}: an import inside of something hides a cycle"
    assert "TYPE_CHECKING" not in path.read_text(encoding="utf-8")


def test_a_pass_imports_no_other_pass():
    passes = {path.stem for path in pass_files()}
    for path in (path for path in FILES if room(path) == "passes" and path.stem != "pipeline"):
        taken = {target[1] for _, target in project_imports(path) if target[0] == "passes"}
        assert not taken & passes - {path.stem}, f"{name(path)} imports the pass {taken & passes}"


def test_passes_know_instructions_and_layouts_but_not_the_machine():
    for path in (path for path in FILES if room(path) == "passes"):
        taken = {target[1] for _, target in project_imports(path) if target[0] == "runtime"}
        assert taken <= PASSES_SEE_OF_RUNTIME, f"{name(path)} imports {taken - PASSES_SEE_OF_RUNTIME}"


@EVERY_FILE
def test_private_torch_is_used_in_one_module(path):
    if name(path) in PRIVATE_TORCH:
        return
    private = [target for _, target in imports(path) if target.startswith("torch._")]
    reads = {ast.unparse(node) for node in ast.walk(TREES[path]) if isinstance(node, ast.Attribute)}
    private += [text for text in reads if text.startswith("torch._") and not text.startswith("torch.__")]
    assert private == [], f"{name(path)} reads {private}; put it into runtime/torch_private.py"


# -- sizes and manners -------------------------------------------------------------------------------------


@EVERY_FILE
def test_modules_are_short_and_say_what_they_are(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE
    assert ast.get_docstring(TREES[path])


@EVERY_FILE
def test_functions_are_short(path):
    for qualified, function, _ in functions(path):
        length = function.end_lineno - function.lineno + 1
        allowed = length <= LONGEST_FUNCTION or is_command(function) or qualified in LONGER_FUNCTIONS
        assert allowed, f"{qualified} has {length} lines"


@EVERY_FILE
def test_functions_have_few_parameters(path):
    for qualified, function, is_method in functions(path):
        taken = function.args
        static = any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)
        count = len(taken.posonlyargs + taken.args + taken.kwonlyargs) - (is_method and not static)
        # An operator's kernels take what its schema says, and that takes no dataclass.
        kernel = any(ast.unparse(d).startswith("torch.library.") for d in function.decorator_list)
        few = count <= MOST_PARAMETERS or kernel or is_command(function)
        allowed = few or qualified in MORE_PARAMETERS
        assert allowed, f"{qualified} has {count} parameters; make them a dataclass"


@EVERY_FILE
def test_no_globals_no_printing_no_attributes_on_nodes(path):
    for node in ast.walk(TREES[path]):
        assert not isinstance(node, ast.Global), f"{name(path)}:{node.lineno}: global"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print" or name(path) in MAY_PRINT, f"{name(path)}:{node.lineno}: print"


def test_only_the_program_and_capture_touch_meta():
    allowed = {"passes/program.py", "compiler/capture.py", "runtime/torch_private.py"}
    for path in FILES:
        keyed = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Subscript) and _is_meta(n.value)]
        called = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Attribute) and _is_meta(n.value)]
        used = [n.lineno for n in keyed + called if not (isinstance(n, ast.Attribute) and n.attr == "update")]
        assert used == [] or name(path) in allowed, f"{name(path)}: lines {used} read meta; use program.note"


def _is_meta(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "meta"


def test_exceptions_are_still_needed():
    known = {qualified for path in FILES for qualified, _, _ in functions(path)}
    assert set(LONGER_FUNCTIONS) | set(MORE_PARAMETERS) <= known
    assert set(MAY_PRINT) | set(PRIVATE_TORCH) <= {name(path) for path in FILES}


# -- passes ------------------------------------------------------------------------------------------------


def pass_files() -> list[Path]:
    """The files of passes/ that declare a pass."""
    return [
        path
        for path in FILES
        if room(path) == "passes"
        and any(
            isinstance(node, ast.FunctionDef)
            and any(ast.unparse(decorator).startswith("graph_pass(") for decorator in node.decorator_list)
            for node in TREES[path].body
        )
    ]


def test_passes_are_found():
    assert {"canonicalize", "partition", "chunk", "release"} <= {path.stem for path in pass_files()}


@pytest.mark.parametrize("path", pass_files(), ids=lambda path: path.stem)
def test_a_pass_file_shows_what_it_does_and_is_tested(path):
    text = ast.get_docstring(TREES[path]) or ""
    assert "before" in text and "after" in text, f"{name(path)}: show the program before and after in the docstring"
    declared = [
        node.name
        for node in TREES[path].body
        if isinstance(node, ast.FunctionDef) and any("graph_pass" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert declared == [path.stem], f"{name(path)}: one pass, named like its file"
    assert (ROOT / "tests" / "passes" / f"test_{path.stem}.py").exists()
    assert list((ROOT / "tests" / "golden").glob(f"{path.stem}_*.py"))
