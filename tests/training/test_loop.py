"""What the loop does beyond Trainer: optimizer, mixed images, parts of batches, full fine-tuning, stopping at NaN."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from gift import GiftConfig
from gift.training.arguments import FinetuneOptions
from gift.training.finetune import finetune
from gift.training.folder import COMPLETE
from gift.training.loop import AdapterTrainer, TrainingDivergedError, make_optimizer, training_arguments
from gift.training.saver import CheckpointSaver
from tests.models import make_images
from tests.training.killed_run import Stripes, make_backbone, train
from tests.training.test_finetune import Killed, interrupt

GIFT = {"r": 4, "num_clusters": 6}


def run(folder, config=None, train=None, evaluation=None, **changes):
    options = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "progress": False}
    images = Stripes(noise=0) if train is None else train
    return finetune(
        make_backbone(hidden_dropout_prob=0.0),
        config,
        images,
        evaluation,
        FinetuneOptions(folder, **(options | changes)),
    )


def weights(result):
    return {name: parameter.detach().clone() for name, parameter in result.model.named_parameters()}


def largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


class Poisoned(Stripes):
    """Stripes whose image of one index is NaN when it is read for the time of number `at`."""

    def __init__(self, at):
        super().__init__()
        self.at, self.reads = at, 0

    def __getitem__(self, index):
        item = super().__getitem__(index)
        self.reads += index == 5
        if index == 5 and self.reads >= self.at:
            item["pixel_values"] = item["pixel_values"] * float("nan")
        return item


def test_a_batch_in_parts_trains_as_the_whole_batch_does(tmp_path):
    whole = run(tmp_path / "whole", GiftConfig(**GIFT), optimizer="sgd")
    parts = run(tmp_path / "parts", GiftConfig(**GIFT), optimizer="sgd", accumulation=4)
    start = weights(run(tmp_path / "start", GiftConfig(**GIFT), optimizer="sgd", learning_rate=0.0))
    assert largest_difference(weights(whole), start) > 1e-3
    assert largest_difference(weights(whole), weights(parts)) < 1e-6


def test_further_terms_of_the_loss_count_once_however_many_parts_a_batch_has(tmp_path):
    options = {"optimizer": "sgd", "diversity": 1}
    whole = run(tmp_path / "whole", GiftConfig(**GIFT), **options)
    parts = run(tmp_path / "parts", GiftConfig(**GIFT), accumulation=4, **options)
    assert largest_difference(weights(whole), weights(parts)) < 1e-6


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    with pytest.raises(ValueError, match="8 cannot be divided among 3"):
        run(tmp_path, accumulation=3)


def test_sgd_has_momentum_and_the_rates_of_adapter_and_head():
    model = make_backbone()
    options = FinetuneOptions("unused", optimizer="sgd", learning_rate=0.1, head_learning_rate=0.2)
    optimizer = make_optimizer(model, options)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert rate_of[id(model.classifier.weight)] == 0.2
    assert rate_of[id(model.vit.layernorm.weight)] == 0.1


@pytest.mark.parametrize("option", ["mixup", "cutmix"])
def test_mixed_images_are_learned_with_labels_in_the_same_proportion(option, tmp_path, monkeypatch):
    seen = []
    original = AdapterTrainer.compute_loss

    def watch(self, model, inputs, *arguments, **named):
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        mixed = self.mix(inputs["pixel_values"], inputs["labels"])
        monkeypatch.setattr(self, "mix", lambda *_: mixed)
        loss = original(self, model, inputs, *arguments, **named)
        seen.append((before, *mixed, loss.item()))
        monkeypatch.undo()
        return loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", watch)
    result = run(tmp_path, epochs=1, learning_rate=0.0, **{option: 1.0})
    before, pixels, targets, loss = seen[0]
    assert (pixels - before["pixel_values"]).abs().max() > 0.1
    assert targets.sum(dim=1).allclose(torch.ones(8))
    logits = result.model(pixel_values=pixels).logits.double()
    expected = -(targets.double() * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert loss == pytest.approx(expected.item(), abs=1e-5)


def test_smoothed_labels_are_for_training_only(tmp_path):
    result = run(
        tmp_path, GiftConfig(**GIFT), evaluation=Stripes(noise=0), epochs=1, label_smoothing=0.3, learning_rate=0.0
    )
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    items = [Stripes(noise=0)[index] for index in range(32)]
    labels = torch.tensor([item["labels"] for item in items])
    logits = result.model(pixel_values=torch.stack([item["pixel_values"] for item in items])).logits
    assert log[0]["loss"] == pytest.approx(cross_entropy(logits, labels, label_smoothing=0.3).item(), abs=1e-4)
    assert result.metrics["loss"] == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-4)


def test_bf16_computes_the_forward_in_bf16_and_keeps_weights_in_float32(tmp_path):
    plain = run(tmp_path / "float32", GiftConfig(**GIFT))
    mixed = run(tmp_path / "bf16", GiftConfig(**GIFT), precision="bf16")
    assert {parameter.dtype for parameter in mixed.model.parameters()} == {torch.float32}
    assert 1e-6 < largest_difference(weights(plain), weights(mixed)) < 0.1


def test_full_fine_tuning_trains_everything_and_stores_a_model_of_transformers(tmp_path):
    result = run(tmp_path, "full", learning_rate=1e-3)
    start = weights(run(tmp_path / "start", "full", learning_rate=0.0))
    now = weights(result)
    assert all((now[name] != start[name]).any() for name in now if "key.bias" not in name and "k_proj.bias" not in name)
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(reloaded(make_images()).logits, result.model(make_images()).logits)
    assert result.metrics["method"] == "full"
    assert result.metrics["trained_parameters"] == sum(p.numel() for p in reloaded.parameters())
    assert result.metrics["trained_parameters_without_head"] == result.metrics["trained_parameters"] - 32 * 3 - 3


def test_a_complete_full_run_is_loaded_and_not_repeated(tmp_path):
    first = run(tmp_path, "full")
    again = run(tmp_path, "full", train=Stripes(noise=0))
    assert torch.equal(again.model(make_images()).logits, first.model(make_images()).logits)


def test_a_killed_full_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    options = {"evaluation": Stripes(9, noise=0), "learning_rate": 1e-3, "epochs": 3}
    whole = run(tmp_path / "whole", "full", **options)
    interrupt(monkeypatch, CheckpointSaver, "on_epoch_end", at=1)
    with pytest.raises(Killed):
        run(tmp_path / "killed", "full", **options)
    continued = run(tmp_path / "killed", "full", **options)
    assert largest_difference(weights(continued), weights(whole)) == 0
    assert (tmp_path / "killed/model/model.safetensors").read_bytes() == (
        tmp_path / "whole/model/model.safetensors"
    ).read_bytes()


def test_the_best_epoch_of_a_full_run_is_its_result(tmp_path, monkeypatch):
    accuracies = iter((0.5, 0.9, 0.1, 0.9))  # the last is of the result
    monkeypatch.setattr("gift.training.finetune.accuracy", lambda _: {"accuracy": next(accuracies)})
    options = {"learning_rate": 1e-3, "schedule": "constant_with_warmup", "warmup_ratio": 0.0}
    best = run(tmp_path / "best", "full", evaluation=Stripes(9, noise=0), epochs=3, select_best=True, **options)
    assert best.metrics["best_epoch"] == 2
    two_epochs = run(tmp_path / "two", "full", epochs=2, **options)
    assert largest_difference(weights(best), weights(two_epochs)) == 0


def test_a_checkpoint_that_lacks_weights_of_the_model_is_refused(tmp_path, monkeypatch):
    interrupt(monkeypatch, CheckpointSaver, "on_epoch_end", at=1)
    with pytest.raises(Killed):
        run(tmp_path, "full")
    weights_file = tmp_path / "checkpoints" / "checkpoint-4" / "model.safetensors"
    save_file({f"old.{name}": tensor for name, tensor in load_file(weights_file).items()}, weights_file)
    with pytest.raises(ValueError, match=r"checkpoint in .* lacks vit\..* \(and \d+ more\).*--resume false"):
        run(tmp_path, "full")
    assert weights_file.exists()


def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(
        TrainingDivergedError, match=r"The loss is nan at step (9|1\d) .*checkpoint-8.*Lower learning_rate"
    ):
        run(tmp_path, GiftConfig(**GIFT), train=Poisoned(at=4), epochs=6)
    (kept,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    assert kept.name == "checkpoint-8"
    assert not (tmp_path / "metrics.json").exists()
    assert not list(tmp_path.glob("adapter*"))


def test_the_last_good_checkpoint_is_the_one_of_most_steps(tmp_path):
    for step in (90, 100):
        (tmp_path / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"checkpoint-{step}" / COMPLETE).write_text("{}")
    arguments = training_arguments(tmp_path, FinetuneOptions(tmp_path, progress=False))
    assert "checkpoint-100. Lower" in AdapterTrainer(make_backbone(), arguments)._diverged("The loss is nan")


def test_parameters_that_are_not_finite_are_never_stored(tmp_path):
    with pytest.raises(TrainingDivergedError, match="there is no checkpoint yet"):
        run(
            tmp_path,
            GiftConfig(**GIFT),
            learning_rate=1e38,
            weight_decay=0.0,
            optimizer="sgd",
            schedule="constant_with_warmup",
            warmup_ratio=0.0,
        )
    assert not list((tmp_path / "checkpoints").glob("checkpoint-*/complete.json"))


def test_a_full_disk_is_said_and_the_run_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch):
    complete = train(tmp_path / "complete")
    original, calls = torch.save, []

    def full(*arguments, **named):
        calls.append(arguments)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        return original(*arguments, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step 10 could not be written .*No space left.*Is the disk full"):
        train(tmp_path / "run")
    monkeypatch.undo()
    assert weights(train(tmp_path / "run")).keys() == weights(complete).keys()
    assert largest_difference(weights(train(tmp_path / "run")), weights(complete)) == 0
