"""PEFT's cases about whole models: copies of them, the backbone's own state dict, FSDP."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from peft import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from tests.models import perturb
from tests.tuner.test_peft_cases_models import (
    adapt,
    adapt_twice,
    assert_same,
    differ,
    every_generator,
    every_kind,
    gradients,
    make_base,
    normal,
    run,
)


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch": through_torch}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["mlp", "timm", "gpt2"])
def test_a_copy_of_a_whole_model_is_equal_and_independent(kind, how):
    model = adapt_twice(kind)
    before = run(model, kind)

    copied = COPIES[how](model)

    assert torch.equal(run(copied, kind), before)
    perturb(copied)
    assert differ(run(copied, kind), before)
    copied.unload()
    assert torch.equal(run(model, kind), before)


@every_kind
def test_the_backbones_state_dict_can_be_read_and_written_under_its_own_names(kind):
    original = make_base(kind).state_dict()
    model = adapt(kind, modules_to_save=["head"] if kind == "timm" else [])

    read = get_base_model_state_dict(model)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(0.1)
    result = set_base_model_state_dict(model, original)

    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for state in (read, get_base_model_state_dict(model)):
        assert state.keys() == original.keys()
    with model.disable_adapter():
        assert torch.equal(run(model, kind), run(make_base(kind), kind))


# ---- FSDP ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    try:
        dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    except RuntimeError as error:
        if "Unable to find interface" not in str(error):
            raise
        pytest.skip("gloo needs a loopback interface that is up, even for one process")
    yield
    dist.destroy_process_group()


@every_generator
def test_a_fully_sharded_model_computes_and_gets_gradients(generator, process_group):
    model, plain = adapt("timm", generator=generator), adapt("timm", generator=generator)
    expected = gradients(plain, "timm")

    fully_shard(model)

    assert_same(run(model, "timm"), run(plain, "timm"))
    found = {name: gradient.full_tensor() for name, gradient in gradients(model, "timm").items()}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10)])
def test_the_output_of_an_adapted_layer_is_no_view_as_that_of_a_plain_one_is_none(shape):
    # FSDP warns of wrong gradients where a sharded module returns a view that is then changed in place.
    assert not make_base("mlp").lin0(normal(*shape))._is_view()
    assert not adapt().base_model.model.lin0(normal(*shape))._is_view()


@pytest.mark.parametrize("kind", ["mlp", "timm"])
def test_the_adapter_of_a_model_in_fsdp_is_read_and_gives_the_same_output(kind, process_group):
    model = adapt(kind, modules_to_save=["head"] if kind == "timm" else [])
    before = run(model, kind)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, about one process and about FSDP's future
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        output, state = run(sharded, kind), get_peft_model_state_dict(sharded)

    plain = adapt(kind, perturbed=False, modules_to_save=["head"] if kind == "timm" else [])
    assert set_peft_model_state_dict(plain, state).unexpected_keys == []
    assert_same(output, before)
    assert_same(run(plain, kind), before)
