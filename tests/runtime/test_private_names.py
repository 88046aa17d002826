"""The private names of torch, diffusers and accelerate: each behaves as the package assumes in the
installed version, and only ``visattn/runtime/private_names.py`` uses them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_imports import MODULES

from visattn.runtime import private_names

MODULE = "visattn.runtime.private_names"
# Private names of the standard library, and one of Triton inside a kernel.
STANDARD = {"_asdict", "_replace", "_getframe", "_reconstructor", "_reinterpret"}
# Attributes that the package puts on objects of these libraries.
OF_VISATTN = {"_visattn", "_visattn_own"}
OF_CACHE_DIT = {"_cp_config", "_is_cached"}  # which is not installed


# ---- where they are used


def is_of_self(node: ast.Attribute) -> bool:
    """Return whether an attribute is one of ``self`` or ``cls``."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@functools.cache
def defined_names() -> frozenset[str]:
    """Return the names that the package defines: functions, classes, variables, attributes."""
    names = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.update({node.attr} if is_of_self(node) else ())
    names.update(OF_VISATTN)
    return frozenset(names)


def is_private(name: str) -> bool:
    """Return whether a name begins with a single underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_uses(source: str) -> set[str]:
    """Return the private names of other libraries that ``source`` uses as an attribute of another
    object than ``self`` or in an import."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names.update(() if is_of_self(node) else {node.attr})
        elif isinstance(node, ast.Import):
            foreign = (one.name for one in node.names if not one.name.startswith("visattn"))
            names.update(part for name in foreign for part in name.split("."))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("visattn"):
            names.update((node.module or "").split("."))
            names.update(one.name for one in node.names)
    return {name for name in names if is_private(name)} - defined_names() - STANDARD


@functools.cache
def known_names() -> frozenset[str]:
    """Return the private names that the module uses, also as strings."""
    source = inspect.getsource(private_names)
    strings = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    quoted = {text for text in strings if text.isidentifier() and is_private(text)}
    return frozenset(private_uses(source) | quoted)


def uses(source: str) -> set[str]:
    """Return the private names that ``source`` uses, also as strings, such as in ``getattr``."""
    strings = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return private_uses(source) | (strings & known_names())


def test_no_other_module_uses_a_private_name():
    by_module = {
        module: names
        for module, path in MODULES.items()
        if module != MODULE and (names := uses(path.read_text(encoding="utf-8")))
    }
    assert by_module == {}


@pytest.mark.parametrize(
    "source",
    [
        "from diffusers.models.attention_dispatch import _AttentionBackendRegistry",
        "import torch._dynamo",
        "from torch._C import thing",
        "torch._C._functorch.is_batchedtensor(x)",
        "torch.utils._pytree.tree_map(f, x)",
        "pipe._some_new_name",
        "getattr(pipe, '_guidance_scale', None)",
        "processor._attention_backend = None",
    ],
)
def test_a_use_is_found(source):
    assert uses(source)


@pytest.mark.parametrize("source", ["self._start", "node._replace(x=1)", "import visattn._atomic"])
def test_what_is_not_foreign_is_fine(source):
    assert not uses(source)


def test_every_name_is_listed_and_explained():
    functions = inspect.getmembers(private_names, inspect.isfunction)
    public = {name for name, value in functions if value.__module__ == MODULE}
    assert set(private_names.__all__) == public | {"CHECKPOINTING", "WRAPPER_STEPS"}
    assert all(getattr(private_names, name).__doc__ for name in public)
    assert known_names() >= OF_CACHE_DIT


def test_the_module_loads_no_library_but_torch():
    code = f"""
import sys, {MODULE}
assert not {{"diffusers", "accelerate", "triton", "torch._dynamo"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- torch


def test_is_batched():
    seen = []
    torch.vmap(lambda x: seen.append(private_names.is_batched(x)) or x)(torch.zeros(2, 3))
    assert seen == [True]
    assert not private_names.is_batched(torch.zeros(2))


def exact(q, k, v, factor):
    """Return the attention and its LSE in float64."""
    logits = q.double() @ k.double().mT * factor
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


def test_flash_attention_cpu():
    q, k, v = torch.randn(3, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    for result, right in zip(
        private_names.flash_attention_cpu(q, k, v, 0.3), exact(q, k, v, 0.3), strict=True
    ):
        torch.testing.assert_close(result.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_flash_attention_cuda():
    q, k, v = torch.randn(3, 1, 2, 5, 16, device="cuda").half()
    out, lse = private_names.flash_attention_cuda(q, k, v, 0.3)
    right, right_lse = exact(q, k, v, 0.3)
    torch.testing.assert_close(out.double(), right, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse[..., :5].double(), right_lse, atol=1e-2, rtol=1e-2)


def test_flash_attention_cuda_exists():
    schema = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
    assert [one.name for one in schema.arguments[:6]] == [
        "query", "key", "value", "dropout_p", "is_causal", "return_debug_mask",
    ]  # fmt: skip
    assert [one.name for one in schema.returns[:2]] == ["output", "logsumexp"]


def test_mark_constant_sets_what_torch_sets():
    def ours() -> int:
        return 1

    private_names.mark_constant(ours)
    assert vars(torch.compiler.assume_constant_result(lambda: 1)) == vars(ours)


def test_never_compile_alone():
    from torch._dynamo.testing import CompileCounter

    def function(x):
        return x + 1

    torch._dynamo.reset()
    before, after = CompileCounter(), CompileCounter()
    torch.compile(function, backend=before)(torch.zeros(2))
    torch._dynamo.reset()  # which would also forget what the function sets
    private_names.never_compile_alone(function)
    torch.compile(function, backend=after)(torch.zeros(2))
    assert (before.frame_count, after.frame_count) == (1, 0)


def test_tensor_version():
    x = torch.zeros(2)
    before = private_names.tensor_version(x)
    x.add_(1)
    assert private_names.tensor_version(x) > before


def test_compiled_module_and_wrapper_steps():
    inner = torch.nn.Linear(1, 1)
    compiled = torch.compile(inner)
    assert private_names.compiled_module(compiled) is inner
    assert private_names.compiled_module(inner, 0) == 0
    (path,) = {name.rpartition(".")[0] for name, _ in compiled.named_parameters()}
    assert path in private_names.WRAPPER_STEPS


def test_checkpoint_wrapper_step():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = checkpoint_wrapper(torch.nn.Linear(1, 1))
    children = {name for name, _ in wrapped.named_children()}
    assert children <= private_names.WRAPPER_STEPS and children


def test_fsdp_step():
    from torch.distributed.fsdp import fully_sharded_data_parallel as fsdp

    assert fsdp.FSDP_WRAPPED_MODULE in private_names.WRAPPER_STEPS


def test_compiled_call():
    module = torch.nn.Linear(1, 1)
    assert private_names.compiled_call(module) is None
    module.compile(backend="eager")
    call = private_names.compiled_call(module)
    assert callable(call)
    private_names.set_compiled_call(module, lambda x: "compiled")
    assert module(torch.zeros(1)) == "compiled"
    private_names.set_compiled_call(module, None)
    assert module(torch.zeros(1)).shape == (1,)


# ---- pipelines, schedulers and models of diffusers


def test_execution_device_and_progress_bar():
    from diffusers import DiffusionPipeline

    assert isinstance(DiffusionPipeline._execution_device, property)
    pipe = DiffusionPipeline()
    pipe.register_to_config()
    assert private_names.progress_bar_settings(pipe) is None
    pipe.set_progress_bar_config(disable=True)
    assert private_names.progress_bar_settings(pipe) == {"disable": True}
    private_names.set_progress_bar_settings(pipe, None)
    assert private_names.progress_bar_settings(pipe) == {}
    assert private_names.execution_device(SimpleNamespace(_execution_device="cpu")) == "cpu"
    assert private_names.execution_device(object()) is None


def test_class_attributes_of_diffusers():
    import diffusers

    pipe, model = diffusers.WanPipeline, diffusers.WanTransformer3DModel
    assert "transformer" in private_names.lora_roles(pipe, ())
    assert private_names.lora_roles(object(), ("x",)) == ("x",)
    assert private_names.repeated_blocks(model) == ["WanTransformerBlock"]
    assert "scale_shift_table" in private_names.float32_modules(model)
    assert private_names.CHECKPOINTING in inspect.getsource(diffusers.ModelMixin)
    for name in ("_cache_config", "_parallel_config"):
        assert name in dir(model)
    assert private_names.cache_settings(model) is None
    assert private_names.parallel_settings(model) is None


def test_names_of_a_running_pipeline():
    import diffusers

    names = diffusers.WanPipeline.__call__.__wrapped__.__code__.co_names
    assert private_names.uses_current_timestep(names)
    assert {"_guidance_scale", "_guidance_scale_2"} <= set(names)
    pipe = SimpleNamespace(_current_timestep=3, _guidance_scale=4.0, _guidance_scale_2=5.0)
    assert private_names.has_current_timestep(pipe)
    assert private_names.current_timestep(pipe) == 3
    assert private_names.guidance_scale(pipe) == 4.0
    assert private_names.second_guidance_scale(pipe) == 5.0
    assert not private_names.has_current_timestep(object())
    assert private_names.current_timestep(object()) is None
    assert private_names.guidance_scale(object(), 1.0) == 1.0
    assert private_names.second_guidance_scale(object(), 1.0) == 1.0


def test_step_and_begin_of_a_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert private_names.step_index(scheduler, 9) is None
    scheduler.set_begin_index(1)
    assert private_names.begin_index(scheduler) == 1
    x = torch.zeros(1)
    scheduler.step(x, scheduler.timesteps[1], x)
    assert private_names.step_index(scheduler) == 2
    assert private_names.step_index(object(), "no") == "no"
    assert private_names.begin_index(object()) is None


def test_hooks_of_diffusers_and_groups_on_disk():
    from diffusers.hooks import HookRegistry, ModelHook, group_offloading

    module = torch.nn.Linear(1, 1)
    assert private_names.diffusers_hooks(module) == {}
    hook = ModelHook()
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "mine")
    assert private_names.diffusers_hooks(module) == {"mine": hook}
    group = inspect.getsource(group_offloading.ModuleGroup.__init__)
    assert "self._is_offloaded_to_disk" in group
    assert private_names.is_offloaded_to_disk(SimpleNamespace(_is_offloaded_to_disk=True))
    assert not private_names.is_offloaded_to_disk(None)


# ---- accelerate and cache-dit


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="accelerate is missing")
def test_hook_of_accelerate():
    from accelerate.hooks import ModelHook, add_hook_to_module

    module = torch.nn.Linear(1, 1)
    assert private_names.accelerate_hook(module, 0) == 0
    hook = ModelHook()
    add_hook_to_module(module, hook)
    assert private_names.accelerate_hook(module) is hook


def test_marks_of_cache_dit():
    part = SimpleNamespace(_cp_config=1, _is_cached=True)
    assert private_names.cache_dit_parallel(part) == 1
    assert private_names.has_cache_dit(part)
    assert private_names.cache_dit_parallel(object()) is None
    assert not private_names.has_cache_dit(object())


# ---- attention backends of diffusers


def test_attention_backend_of_a_processor():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    processor = WanAttnProcessor()
    assert private_names.has_attention_backend(processor)
    assert not private_names.has_attention_backend(object())
    assert private_names.attention_backend(processor) is None
    assert not private_names.sets_attention_backend(processor)
    private_names.set_attention_backend(processor, "native")
    assert private_names.sets_attention_backend(processor)
    assert private_names.attention_backend(processor) == "native"
    private_names.remove_attention_backend(processor)
    assert private_names.attention_backend(processor) is None
    assert private_names.parallel_settings(processor) is None
    assert "_parallel_config" in vars(WanAttnProcessor)


def test_backends_of_the_process():
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    assert isinstance(private_names.active_attention_backend(), AttentionBackendName)
    with attention_backend("native"):
        assert private_names.active_attention_backend().value == "native"
        assert private_names.supports_parallel(None) == private_names.supports_parallel(
            AttentionBackendName("native")
        )
    supporting = private_names.parallel_attention_backends()
    assert supporting
    for member in AttentionBackendName:
        assert private_names.supports_parallel(member) == (member.value in supporting)


def test_a_new_backend_is_dispatched_to():
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    def call(query, key, value, attn_mask=None, **_):
        return query + 1

    member = private_names.add_attention_backend("test of private names", call, False)
    assert AttentionBackendName("test of private names") is member
    assert member not in list(AttentionBackendName)
    assert not private_names.supports_parallel(member)
    q = torch.zeros(1, 2, 1, 4)
    assert dispatch_attention_fn(q, q, q, backend=member).equal(q + 1)
