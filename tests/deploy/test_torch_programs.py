"""A torch program from elsewhere runs nothing when it is opened, and what this package writes opens."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sigmab_plugin.deploy import Runner, export_chain, read_manifest
from sigmab_plugin.deploy.backends.torch_program import check_expression, check_program
from sigmab_plugin.errors import FormatError

MODEL = "archive/models/model.json"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"


@pytest.fixture(scope="module")
def program(bundle: Path) -> dict[str, bytes]:
    """The files of the root's program."""
    with zipfile.ZipFile(bundle / read_manifest(bundle).node("").program.file) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    if MODEL not in found:
        pytest.skip("this torch writes programs in another layout")
    return found


def packed(files: dict[str, bytes]) -> bytes:
    writer_buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(writer_buffer)
    for name, content in files.items():
        inside = name.removeprefix("archive/")
        if not inside.startswith((".data", "version", "byteorder")):
            writer.write_record(inside, content, len(content))
    writer.write_end_of_file()
    return writer_buffer.getvalue()


class _Marker:
    """Its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def _first_expression(model: dict[str, Any]) -> dict[str, Any]:
    pending: list[Any] = [model]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if "expr_str" in value:
                return value
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    raise AssertionError("no expression")


def _graph(model: dict[str, Any]) -> Any:
    return model["graph_module"]["graph"]


CHANGES: dict[str, tuple[Callable[[dict[str, Any], str], Any], str]] = {
    "expression": (
        lambda m, code: _first_expression(m).update(expr_str=f"{code} or s0"),
        "no expression of sizes",
    ),
    "expression-in-a-dictionary": (
        lambda m, code: _first_expression(m).update(expr_str={"a": code}),
        "its a is",
    ),
    "expression-in-a-name": (
        lambda m, code: _first_expression(m).update(expr_str=f"Max({code!r}, 1)"),
        "no expression of sizes",
    ),
    "range": (lambda m, code: m.update(range_constraints={code: {"min_val": 1}}), "it holds the name"),
    "function": (lambda m, code: _graph(m)["nodes"][0].update(target="torch.os.system"), "no operation"),
    "file-operation": (
        lambda m, code: _graph(m)["nodes"][0].update(target="torch.ops.aten.from_file.default"),
        "no place in a program",
    ),
    "saving": (
        lambda m, code: _graph(m)["nodes"][0].update(target="torch.ops.aten.save.default"),
        "no place in a program",
    ),
    "path-for-a-library": (
        lambda m, code: _graph(m)["nodes"][0].update(
            target="torch.ops.image.decode.default",
            inputs=[{"name": "at", "arg": {"as_string": "/etc/passwd"}, "kind": 1}],
        ),
        "its as_string is '/etc/passwd'",
    ),
    "comment": (
        lambda m, code: _graph(m)["nodes"][0]["metadata"].update(torch_fn=f"a;b\n{code}"),
        "its torch_fn has several lines",
    ),
    "guard": (lambda m, code: m.update(guards_code=[code]), "its guards_code is"),
    "argument": (
        lambda m, code: m["graph_module"]["module_call_graph"][0]["signature"].update(
            forward_arg_names=[f"weights={code}", "inputs_0"]
        ),
        "its forward_arg_names is",
    ),
    "placeholder": (
        lambda m, code: _graph(m)["inputs"][0]["as_tensor"].update(name=f"weights_0={code}"),
        "its name is",
    ),
    "class": (
        lambda m, code: m["graph_module"]["module_call_graph"][0]["signature"].update(
            out_spec='[1, {"type": "collections.namedtuple", "context": "null", "children_spec": []}]'
        ),
        "of type 'collections.namedtuple'",
    ),
    "enumeration": (
        lambda m, code: m["graph_module"]["module_call_graph"][0]["signature"].update(
            out_spec=json.dumps(
                [
                    1,
                    {
                        "type": "builtins.tuple",
                        "context": '[{"__enum__": true, "fqn": "os:system", "name": "x"}]',
                        "children_spec": [],
                    },
                ]
            )
        ),
        "its arguments are described by",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_code_in_a_program_is_refused(
    program: dict[str, bytes], tmp_path: Path, change: Any, message: str
) -> None:
    model = copy.deepcopy(json.loads(program[MODEL]))
    change(model, f"__import__('pathlib').Path({str(tmp_path / 'mark')!r}).touch()")
    with pytest.raises(FormatError, match=message):
        check_program(packed({**program, MODEL: json.dumps(model).encode()}))


@pytest.mark.parametrize("name", ["tensor_0", "custom_obj_0", "opaque_obj_0"])
def test_pickles_in_a_program_are_refused(program: dict[str, bytes], tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    torch.save(_Marker(tmp_path / "mark"), buffer)
    pickled = pickle.dumps(_Marker(tmp_path / "mark")) if name.startswith("opaque") else buffer.getvalue()
    described = {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}
    config = json.dumps({"config": {"evil": described}}).encode()
    stored = {**program, f"archive/data/constants/{name}": pickled}
    with pytest.raises(FormatError, match=r"pickled|no tensor|no exported program"):
        check_program(packed({**stored, CONSTANTS: config}))
    with pytest.raises(FormatError, match="more than tensors"):  # as torch 2.8 wrote it
        check_program(packed({**program, "archive/data/constants/model.pt": buffer.getvalue()}))
    with pytest.raises(FormatError, match="pickled example inputs"):
        check_program(packed({**program, "archive/data/sample_inputs/model.pt": pickled}))
    with pytest.raises(FormatError, match="which no exported program has"):
        check_program(packed({**program, "archive/data/aotinductor/model/x.so": b"\x7fELF"}))
    assert not (tmp_path / "mark").exists()


def test_tensors_as_torch_2_8_stores_them_are_taken(program: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    torch.save({"c": torch.ones(2)}, buffer)
    rest = {name: content for name, content in program.items() if name not in (WEIGHTS, CONSTANTS)}
    check_program(packed({**rest, "archive/data/constants/model.pt": buffer.getvalue()}))


def test_an_archive_has_one_reading(program: dict[str, bytes]) -> None:
    data = io.BytesIO(packed(program))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(data, "a") as archive:
        archive.writestr(MODEL, b"{}")
    with pytest.raises(FormatError, match="two files of one name"):
        check_program(data.getvalue())
    prefixed = io.BytesIO(packed({**program, MODEL: b"{}"}))
    with zipfile.ZipFile(prefixed, "a") as archive:
        archive.writestr("elsewhere/models/model.json", program[MODEL])
    with pytest.raises(FormatError, match="no exported program"):
        check_program(prefixed.getvalue())
    with pytest.raises(FormatError, match="no archive of torch"):
        check_program(b"not an archive")


def test_the_runner_names_the_node(own_bundle: Path, images: Tensor, program: dict[str, bytes]) -> None:
    model = json.loads(program[MODEL])
    _first_expression(model)["expr_str"] = "print(1)"
    data = packed({**program, MODEL: json.dumps(model).encode()})
    file = own_bundle / read_manifest(own_bundle).node("").program.file
    body = json.loads((own_bundle / "manifest.json").read_text())
    file.write_bytes(data)
    body["nodes"][0]["program"].update(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (own_bundle / "manifest.json").write_text(json.dumps(body))
    with (
        Runner(own_bundle) as runner,
        pytest.raises(FormatError, match=r"node 'root'.*'print\(1\)' is no expr"),
    ):
        runner(images[:1])


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "2*s0 + 1",
        "(s0 - 1)//2",
        "Symbol('s21', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('u0', integer=True)), Integer(-1))",
        "FloorDiv(Symbol('s0', positive=True, integer=True), Integer(2))",
        "Float('1.5', precision=53)",
        "Min(Integer(8), Mul(Integer(8), Symbol('s21', positive=True, integer=True)))",
    ],
)
def test_sizes_that_torch_writes(text: str) -> None:
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "s0.__class__",
        "Max('print(1)', 1)",
        "Symbol('s0').func('print(1)')",
        "Symbol(name='print(1)')",
        "lambda: 1",
        "[s0]",
        "eval('1')",
        "exit()",
        "s0 if s0 else s1",
        "(s0,)",
        "f'{s0}'",
        "",
        "(" * 500,
        "Integer(b'1')",
    ],
)
def test_sizes_that_are_code(text: str) -> None:
    with pytest.raises(FormatError, match="no expression of sizes"):
        check_expression(text)


class _Varied(nn.Module):
    """Constants, a graph in a graph, text as an argument, sizes that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(2))

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = x * torch.tensor([1.0, 2.0, -torch.inf, 4.0]).clamp(-5)
        chosen = torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,))
        padded = nn.functional.pad(chosen, (1, 1), mode="reflect")[:, self.order]
        rows = y.reshape(x.shape[0] * 3, 4).reshape(-1, 12)
        return rows, padded.flatten(1), torch.vmap(lambda a: a.sum(0))(x)


class _Joined(nn.Module):
    def forward(self, values: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(values, 1)


def test_programs_that_this_package_writes_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_Varied(), _Joined()).eval()
    x = torch.randn(3, 3, 4)
    export_chain([model], x, tmp_path / "b", format="torch")
    with torch.no_grad(), Runner(tmp_path / "b") as runner:
        torch.testing.assert_close(torch.from_numpy(runner(x)), model(x))
