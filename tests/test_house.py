"""House rules: one-way imports, pinned names, docstrings, shapes in annotations, a light import."""

import ast
import inspect
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jaxtyping import AbstractArray, jaxtyped

import flexnsa
import flexnsa_masks
from flexnsa import MeanPool, NSAConfig, nsa

ROOT = Path(__file__).parent.parent

# The data flows from the first to the last; a module imports only modules before it.
ORDER = [
    "config",
    "types",
    "checks",
    "kept",
    "layout",
    "visibility",
    "engines",
    "compiled",
    "compression",
    "pages",
    "kernels",
    "dense",
    "reference",
    "static_masks",
    "flash",
    "flex",
    "compressed",
    "importance",
    "selection",
    "selected",
    "window",
    "gating",
    "nsa",
    "paged_reference",
    "paged",
    "bias",
    "context",
    "frames",
    "branches",
    "composition",
    "rotary",
    "cache",
    "layer",
    "inspect",
]

SIGNATURES = {
    "NSAConfig": "compress_block compress_stride select_block num_selected num_initial num_local window",
    "AttentionOutput": "out lse",
    "Selection": "indices",
    "BranchKV": "compressed selected window",
    "BranchKV.shared": "k v",
    "MeanPool": "config",
    "BlockCompressor.forward": "self k v * starts",
    "BlockCompressor.pool": "self k_blocks v_blocks",
    "compressed_attention": "q k_cmp v_cmp config * scale positions documents mask_mod score_mod lse_grad impl",
    "window_attention": "q k v config * scale positions documents mask_mod score_mod lse_grad impl",
    "block_importance": "q k_cmp lse config * num_tokens scale positions documents mask_mod score_mod",
    "select_blocks": "q k_cmp lse config * num_tokens scale positions documents mask_mod score_mod impl",
    "selected_attention": "q k v selection config * scale positions documents mask_mod score_mod impl",
    "native_sparse_attention": "q kv gates config compressor * scale positions documents selection mask_mod recompute "
    "impl",
    "NativeSparseAttention": "* dim num_heads num_kv_heads head_dim value_dim config compressor shared_kv rope_theta "
    "qk_norm compress_rotated recompute impl",
    "NativeSparseAttention.forward": "self x * documents cache mask_mod",
    "NativeSparseAttention.forward_part": "self x * positions gather documents mask_mod",
    "NativeSparseAttention.new_cache": "self batch max_tokens max_rollback * device dtype",
    "NSACache.crop": "self tokens",
    "NSACache.reorder": "self rows",
    "NSACache.reset": "self",
    "NSACache.to": "self device",
    "SparseAttention": "branches gate * selector recompute impl",
    "SparseAttention.forward": "self q kv x * positions documents mask_mod selection",
    "SparseAttention.attend": "self q kv x * positions documents mask_mod selection",
    "SparseAttention.mix": "self context",
    "Selection.from_scores": "scores num_selected",
    "Selection.from_mask": "chosen num_selected",
    "Selection.to_mask": "self num_blocks",
    "Attended": "k v scale score_mod",
    "CompressedBranch": "config compressor * scale score_mod",
    "SelectedBranch": "config * scale score_mod bias",
    "WindowBranch": "config * scale score_mod",
    "ImportanceSelector": "config * branch",
    "ImportanceSelector.importance": "self q context",
    "ImportanceBias": "config weight * eps branch",
    "importance_bias": "q k_cmp lse config * selection num_tokens weight eps scale positions documents mask_mod "
    "score_mod",
    "Branch.attend": "self q k v context",
    "Selector.select": "self q context",
    "documents_from_lengths": "lengths tokens",
    "Pages": "k v table",
    "PagedKV": "compressed selected window",
    "StepOutput": "out selection",
    "paged_step": "q gates pages lengths config * scale out impl",
    "paged_append": "kv pages lengths config * counts compressor recent impl",
}


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_place():
    names = {path.stem for path in (ROOT / "flexnsa").glob("*.py")} | {"kernels", "cache", "inspect"}
    assert names - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", [name for name in ORDER if name != "kernels"])
def test_imports_go_one_way(name):
    package = ROOT / "flexnsa" / name
    paths = list(package.glob("*.py")) if package.is_dir() else [ROOT / f"flexnsa/{name}.py"]
    own = {module.split(".")[1] for path in paths for module in imported_modules(path) if "flexnsa." in module}
    later = set(ORDER[ORDER.index(name) + package.is_dir() :])
    assert not own & later


def test_only_the_kernels_import_triton():
    for path in (*ROOT.glob("flexnsa/*.py"), *ROOT.glob("flexnsa/cache/*.py"), *ROOT.glob("flexnsa/inspect/*.py")):
        assert not any(module.split(".")[0] == "triton" for module in imported_modules(path)), path


def test_the_core_knows_no_integration():
    for path in ROOT.glob("flexnsa/**/*.py"):
        imported = imported_modules(path)
        if "integrations" not in path.parts:
            assert not any(module.startswith("flexnsa.integrations") for module in imported), path
        if "transformers" not in path.parts:
            assert not any(module.split(".")[0] == "transformers" for module in imported), path


def test_masks_need_torch_alone():
    allowed = set(sys.stdlib_module_names) | {"torch", "flexnsa_masks"}
    for path in ROOT.glob("masks/flexnsa_masks/*.py"):
        assert {module.split(".")[0] for module in imported_modules(path)} <= allowed, path


def test_importing_is_light():
    code = "import sys, flexnsa; print([m for m in ('triton', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_pinned(name):
    value = flexnsa
    for part in name.split("."):
        value = getattr(value, part)
    parameters = inspect.signature(value).parameters.values()
    names, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only and not issubclass_config(value):
            names.append("*")
            keyword_only = True
        names.append(parameter.name)
    assert " ".join(names) == SIGNATURES[name]


def issubclass_config(value: object) -> bool:
    return value is NSAConfig


def test_all_is_sorted_and_complete():
    assert list(flexnsa.__all__) == sorted(flexnsa.__all__)
    assert {name.split(".")[0] for name in SIGNATURES} <= set(flexnsa.__all__)


def public_objects():
    for package in (flexnsa, flexnsa_masks, flexnsa.inspect):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                yield f"{package.__name__}.{name}", value


@pytest.mark.parametrize(("name", "value"), list(public_objects()), ids=lambda x: x if isinstance(x, str) else "")
def test_public_names_are_documented(name, value):
    assert value.__doc__ and value.__doc__.strip(), name
    if inspect.isclass(value):
        for method_name, method in vars(value).items():
            if inspect.isfunction(method) and not method_name.startswith("_"):
                assert inspect.getdoc(getattr(value, method_name)), f"{name}.{method_name}"


def shape_checked(function):
    """``function`` with its annotations' axes and dtypes checked on each call, one binding of axes for all of them."""
    hints, signature = typing.get_type_hints(function), inspect.signature(function)

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        with jaxtyped("context"):
            for name, value in bound.arguments.items():
                assert_annotated(value, hints[name], f"{function.__name__}({name}=)")
            result = function(*args, **kwargs)
            assert_annotated(result, hints["return"], f"{function.__name__} result")
        return result

    return call


def assert_annotated(value, hint, where):
    if typing.get_origin(hint) is tuple:
        for item, item_hint in zip(value, typing.get_args(hint), strict=True):
            assert_annotated(item, item_hint, where)
    elif isinstance(hint, type) and issubclass(hint, AbstractArray):
        assert isinstance(value, hint), f"{where}: expected {hint}, got {value.dtype} {tuple(value.shape)}"
    elif value is not None and typing.get_origin(hint) is not None:
        options = [arg for arg in typing.get_args(hint) if isinstance(arg, type) and issubclass(arg, AbstractArray)]
        assert not options or any(isinstance(value, option) for option in options), f"{where}: {tuple(value.shape)}"
    elif hasattr(hint, "_fields"):
        for field, field_hint in typing.get_type_hints(hint).items():
            assert_annotated(getattr(value, field), field_hint, f"{where}.{field}")


STAGES = ("compressed_attention", "select_blocks", "selected_attention", "window_attention", "native_sparse_attention")


def public_callables():
    """Public functions, and the public methods (``forward`` among them) of public classes."""
    for name in flexnsa.__all__:
        value = getattr(flexnsa, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            methods = {n: f for n, f in vars(value).items() if inspect.isfunction(f) and not n.startswith("_")}
            yield from ((f"{name}.{method}", function) for method, function in methods.items())


@pytest.mark.parametrize(("name", "function"), list(public_callables()), ids=lambda x: x if isinstance(x, str) else "")
def test_every_public_tensor_is_annotated_with_its_axes(name, function):
    hints = typing.get_type_hints(inspect.unwrap(function))
    tensors = {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not Callable}
    bare = [argument for argument, hint in tensors.items() if torch.Tensor in (hint, *typing.get_args(hint))]
    assert not bare, f"{name}: {bare} without axes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_annotations_hold_on_real_calls(monkeypatch, dtype):
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=3, window=6)
    for name in STAGES[:-1]:
        monkeypatch.setattr(nsa, name, shape_checked(getattr(nsa, name)))
    q, k, v = (torch.randn(2, h, 21, d, dtype=dtype) for h, d in ((6, 5), (2, 5), (2, 3)))
    attend = shape_checked(nsa.native_sparse_attention)
    kv, gates = flexnsa.BranchKV.shared(k, v), torch.rand(2, 6, 21, 3, dtype=dtype)
    documents = flexnsa.documents_from_lengths([[4, 17], [20]], 21)
    attend(q, kv, gates, config, MeanPool(config))
    attend(q, kv, gates, config, MeanPool(config), documents=documents)
    attend(q[:, :, 5:9], kv, gates[:, :, 5:9], config, MeanPool(config), positions=torch.arange(5, 9))
    k_cmp, v_cmp = shape_checked(MeanPool(config).forward)(k, v)
    lse = flexnsa.compressed_attention(q, k_cmp, v_cmp, config).lse
    shape_checked(flexnsa.block_importance)(q, k_cmp, lse, config, num_tokens=21)


def test_a_wrong_annotation_is_noticed():
    checked = shape_checked(nsa.window_attention)
    q, k = torch.randn(1, 4, 8, 5), torch.randn(1, 2, 8, 5)
    with pytest.raises(AssertionError, match="q="):
        checked(q.int(), k, k, NSAConfig())
