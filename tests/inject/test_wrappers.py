"""Denoisers that others wrap: for training over several processes, and by PEFT."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, get_peft_model
from support import tiny
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from visattn import guidance, steer
from visattn.inject import apply_plan, remove_plan, summary
from visattn.patterns import Diagonal

LORA = LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=True)  # which adds 0


class DeepSpeedEngine(torch.nn.Module):
    """What DeepSpeed's class of this name is to us: it holds the model as ``module``."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "DDP": DistributedDataParallel,
    "FSDP": functools.partial(
        FullyShardedDataParallel,
        auto_wrap_policy=ModuleWrapPolicy({WanTransformerBlock}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    ),
    "DeepSpeed": DeepSpeedEngine,
    "PEFT": lambda model: get_peft_model(model, LORA),
    "DDP of PEFT": lambda model: DistributedDataParallel(
        get_peft_model(model, LORA), find_unused_parameters=True
    ),
    "compiled blocks": lambda model: _with_compiled_blocks(model),
}


def _with_compiled_blocks(model: Any) -> Any:
    for name, block in model.blocks.named_children():
        setattr(model.blocks, name, torch.compile(block, backend="eager"))
    return model


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone."""
    path: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def forward(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 3, 12, 8, generator=generator),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 6, 16, generator=generator),
            return_dict=False,
        )[0]


def sparse_calls(model: Any) -> int:
    return sum(row.sparse_calls for row in summary(model).layers)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", WRAPPERS)
def test_plans_go_through_wrappers(name: str) -> None:
    plain = tiny.wan_transformer(3, layers=2)
    dense = forward(plain)
    apply_plan(plain, Diagonal(4))
    sparse = forward(plain)
    assert not torch.equal(sparse, dense)

    wrapped = WRAPPERS[name](tiny.wan_transformer(3, layers=2))
    apply_plan(wrapped, Diagonal(4))
    assert torch.equal(forward(wrapped), sparse)
    assert sparse_calls(wrapped) == 2
    remove_plan(wrapped)
    assert torch.equal(forward(wrapped), dense)
    with steer(wrapped, guidance.SkipBlock(blocks=[1])):
        skipped = forward(wrapped)
    with steer(plain, guidance.SkipBlock(blocks=[1])):
        remove_plan(plain)
        assert torch.equal(forward(plain), skipped)

    later = tiny.wan_transformer(3, layers=2)
    apply_plan(later, Diagonal(4))
    later = WRAPPERS[name](later)
    assert torch.equal(forward(later), sparse)
    assert sparse_calls(later) == 2
    remove_plan(later)
    assert torch.equal(forward(later), dense)


def test_the_denoiser_of_a_pipeline_is_wrapped() -> None:
    pipe = tiny.wan21(layers=2)
    dense = tiny.generate(pipe, steps=2)
    apply_plan(pipe, Diagonal(4))
    sparse = tiny.generate(pipe, steps=2)
    pipe.transformer = get_peft_model(pipe.transformer, LORA)
    assert torch.equal(tiny.generate(pipe, steps=2), sparse)
    remove_plan(pipe)
    assert torch.equal(tiny.generate(pipe, steps=2), dense)
    apply_plan(pipe, Diagonal(4))
    assert torch.equal(tiny.generate(pipe, steps=2), sparse)
    assert sparse_calls(pipe) == 8
