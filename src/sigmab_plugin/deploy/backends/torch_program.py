"""What a torch.export program may hold before torch opens it.

Opening one evaluates text of it (sizes as SymPy expressions, names as generated Python), looks operations up by
name and may unpickle: a program from elsewhere could run anything. So its archive is read here first, and what is
not known to be harmless is refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from typing import Any

import torch

from ...errors import FormatError

#: Files that torch writes: a model alone, no libraries, no objects. The ``.pt`` ones are those of torch up to 2.8.
_FILES = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|version|byteorder"
    r"|\.format_version|\.storage_alignment|\.data/(version|serialization_id)"
    r"|data/weights/(model_weights_config\.json|model\.pt|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|model\.pt|tensor_\d+)"
    r"|serialized_exported_program\.json|serialized_(state_dict|constants|example_inputs)\.pt",
    re.ASCII,
)
_EXAMPLES = ("data/sample_inputs/model.pt", "serialized_example_inputs.pt")
_TENSORS = re.compile(r"(weight|tensor)_\d+", re.ASCII)
_IDENTIFIER = re.compile(r"([A-Za-z_]\w*)?", re.ASCII)
_WORD = re.compile(r"[\w.@+:-]*", re.ASCII)
#: Where any text may be: arguments of ATen's operations (a padding mode, a message), and where an operation comes from
#: in the model. "!" stands behind nodes with operations of others.
_FREE = re.compile(
    r"/graph_module/graph/nodes((/!)?/inputs/arg/as_graph/graph/nodes)*(/inputs/arg/as_strings?|(/!)?/metadata/\w+)",
    re.ASCII,
)
#: Of these the texts of several lines; compilers write the others into comments.
_LINES = ("as_string", "stack_trace")
_SYMBOL = re.compile(r"[a-z]+\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.ASCII)

#: Operations: ATen's and those of libraries that the process has loaded, of Python's and torch's own the ones that
#: torch.export writes.
_OPERATOR = re.compile(r"torch\.ops\.(?!__)(\w+)\.(?!__)(\w+)\.(?!__)\w+", re.ASCII)
_FUNCTIONS = re.compile(
    r"_operator\.(eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift|getitem)"
    r"|math\.(trunc|ceil|floor)|torch\.sym_(not|int|float|ite|max|min|sqrt)"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|associative_scan)"
    r"|torch\.ops\.higher_order\.wrap_with_(autocast|set_grad_enabled)"
    r"|torch\._functorch\.predispatch\.(_add_batch_dim|_remove_batch_dim|lazy_load_decompositions)"
    r"|torch\._functorch\.predispatch\._vmap_(in|de)crement_nesting"
)
#: Namespaces that torch registers beside ATen: some of them read and write files, or processes.
_TORCHS_OWN = re.compile(
    r"_c10d_functional(_autograd)?|_dtensor|_native|_test|c10d|debug_mode_ops|debugprims|export|fsdp|higher_order"
    r"|inductor|inductor_prims|onednn|prepacked|prim|profiler|rngprims|static_runtime|streams|symm_mem"
)
_FILE_OPERATIONS = re.compile(r"(\w*_)?(files?|load|save|read|write|open)(_\w*)?", re.ASCII)

#: What sizes are made of: SymPy's functions and torch's.
_EXPRESSION_NAMES = re.compile(
    r"Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Abs|Mod|floor|ceiling|sqrt|Equality|Unequality|Eq|Ne"
    r"|(Strict)?(Less|Greater)Than|And|Or|Not|Piecewise|ExprCondPair|true|false|oo|int_oo"
    r"|(Floor|Clean|Ceil|FloatTrue|IntTrue)Div|ModularIndexing|Where|PythonMod|(Ceil|Floor|Trunc|Round)ToInt|LShift"
    r"|RShift|PowByNatural|FloatPow|IsNonOverlappingAndDenseIndicator|TruncToFloat|RoundDecimal|ToFloat|Identity"
)
_EXPRESSION_NODES = (
    ast.Expression,
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow),
    *(ast.UnaryOp, ast.USub, ast.UAdd),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
    *(ast.Call, ast.keyword, ast.Name, ast.Constant, ast.Load),
)


def check_program(data: bytes) -> None:
    """Whether torch may open ``data``: weights and sizes in it are plain, operations known.

    Raises:
        FormatError: it is no program, or holds something else; says what.
    """
    for name, content in _files(data).items():
        if not _FILES.fullmatch(name):
            raise FormatError(f"it holds {name!r}, which no exported program has")
        if name in _EXAMPLES and content:
            raise FormatError(f"it holds pickled example inputs ({name!r})")
        if name.endswith(".json"):
            _check(json.loads(content), "")
        elif name.endswith(".pt") and content:
            try:
                torch.load(io.BytesIO(content), weights_only=True)
            except Exception as error:  # whatever is no dictionary of tensors
                raise FormatError(f"its file {name!r} holds more than tensors") from error


def _files(data: bytes) -> dict[str, bytes]:
    """Contents by name, without the folder around them; the same to torch's reader and to the one it falls back to."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise FormatError("its archive is compressed, which torch never writes")
            content = {info.filename: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise FormatError(f"it is no archive of torch ({error})") from error
    if len(content) != len(infos):
        raise FormatError("its archive holds two files of one name")
    folder = next(iter(content), "").partition("/")[0]
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        seen = {f"{folder}/{name}": reader.get_record(name) for name in reader.get_all_records()}
    except RuntimeError:  # torch up to 2.7 wrote no folder; in any other archive no name is then a known one
        return content
    if seen != content:
        raise FormatError("its archive reads differently to two readers")
    return {name.removeprefix(f"{folder}/"): value for name, value in content.items()}


def _check(value: Any, place: str) -> None:
    """Every text in ``value`` by what torch does with it; ``place`` is the keys that lead to ``value``."""
    if isinstance(value, dict):
        if place.endswith("/nodes") and not str(value.get("target")).startswith("torch.ops.aten."):
            place += "/!"
        for name, inner in value.items():
            if not _WORD.fullmatch(name):
                raise FormatError(f"it holds the name {name[:80]!r}")
            _check(inner, f"{place}/{name}")
    elif isinstance(value, list):
        for inner in value:
            _check(inner, place)
    elif place.endswith("/use_pickle") and value is not False:
        raise FormatError("a tensor of it is pickled")
    elif isinstance(value, str):
        key = place.rpartition("/")[2]
        if not _FREE.fullmatch(place):
            _check_text(value, key)
        elif "\n" in value and key not in _LINES:
            raise FormatError(f"its {key} has several lines")


def _check_text(text: str, key: str) -> None:
    if key == "expr_str":
        check_expression(text)
    elif key in ("target", "as_operator"):
        _check_operation(text)
    elif key in ("in_spec", "out_spec"):
        _check_structure(json.loads(text)[1])
    elif key == "path_name":
        if not _TENSORS.fullmatch(text):
            raise FormatError(f"it names {text[:80]!r}, which is no tensor")
    elif not (_IDENTIFIER if key in ("name", "as_name", "forward_arg_names") else _WORD).fullmatch(text):
        raise FormatError(f"its {key} is {text[:80]!r}")


def _check_operation(text: str) -> None:
    operator = _OPERATOR.fullmatch(text)
    if operator is None and not _FUNCTIONS.fullmatch(text):
        raise FormatError(f"{text[:80]!r} is no operation that an exported program has")
    if operator is not None and (
        _TORCHS_OWN.fullmatch(operator[1]) or _FILE_OPERATIONS.fullmatch(operator[2])
    ):
        raise FormatError(f"operation {text[:80]!r} has no place in a program")


def check_expression(text: str) -> None:
    """Whether ``text``, which SymPy evaluates, is numbers, symbols, arithmetic and known functions.

    Raises:
        FormatError: it is not.
    """
    problem = FormatError(f"{text[:80]!r} is no expression of sizes")
    if not text.isascii() or re.search(r"[\\\n\r]|__", text):
        raise problem
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise problem from error
    quoted = {id(node.args[0]) for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_quoted(node)}
    for node in ast.walk(tree):
        known = isinstance(node, _EXPRESSION_NODES)
        if isinstance(node, ast.Name):
            known = bool(_EXPRESSION_NAMES.fullmatch(node.id) or _SYMBOL.fullmatch(node.id))
        elif isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and bool(_EXPRESSION_NAMES.fullmatch(node.func.id))
        elif isinstance(node, ast.Constant):
            known = isinstance(node.value, (bool, int, float)) or id(node) in quoted
        if not known:
            raise problem


def _is_quoted(call: ast.Call) -> bool:
    """A symbol's name or a number's digits: all the text there may be, for SymPy evaluates texts once more."""
    forms = {"Symbol": _SYMBOL, "Float": _NUMBER}
    if not (isinstance(call.func, ast.Name) and call.func.id in forms and call.args):
        return False
    first = call.args[0]
    text = first.value if isinstance(first, ast.Constant) else None
    return isinstance(text, str) and forms[call.func.id].fullmatch(text) is not None


def _check_structure(spec: Any) -> None:
    """How arguments and results nest: tuples, lists and dictionaries; other types look up classes."""
    if spec["type"] not in (None, "builtins.tuple", "builtins.list", "builtins.dict"):
        raise FormatError(f"its arguments are of type {spec['type']!r}")
    context = json.loads(spec["context"]) if spec["context"] is not None else None
    if context is not None and not all(isinstance(key, str) and _WORD.fullmatch(key) for key in context):
        raise FormatError(f"its arguments are described by {spec['context'][:80]!r}")
    for child in spec["children_spec"]:
        _check_structure(child)
