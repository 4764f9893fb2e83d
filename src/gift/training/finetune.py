"""Fine-tune one image classifier with one adapter; a run that is killed continues where it was, to the same bits.

`gift.training.folder` says what a run leaves in `output_dir`.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from gift.backbones import classification_heads
from gift.baselines.toast import ToastConfig
from gift.pretrained import quiet_loading
from gift.training.arguments import FREE_OPTIONS, LATER_OPTIONS, FinetuneOptions, FinetuneResult, Surroundings, check
from gift.training.averaging import AVERAGE, MovingAverage
from gift.training.folder import delete_unneeded, prepare_once, write, write_folder
from gift.training.items import CheckedItems, Items
from gift.training.loop import (
    AdapterTrainer,
    EpochWatcher,
    accuracy,
    check_terms,
    head_names,
    is_of_head,
    make_optimizer,
    training_arguments,
)
from gift.training.memory import peak_memory_mb
from gift.training.saver import CheckpointSaver

PACKAGES = ("gift-peft", "torch", "transformers", "peft", "accelerate", "timm")
Full = Literal["full"]
LATER = {f"options.{field.name}": field.default for field in fields(FinetuneOptions) if field.name in LATER_OPTIONS}


def finetune(
    backbone: PreTrainedModel,
    config: PeftConfig | Full | None,
    train: Items,
    evaluation: Items | None,
    options: FinetuneOptions,
    surroundings: Surroundings | None = None,
) -> FinetuneResult:
    """Train an adapter and return it, or continue a run that was killed, or return one that is already complete.

    Under `torchrun` or `accelerate launch` several processes share the images of every step (DDP); one of them writes.

    On one CPU thread the adapter of a killed and continued run is bitwise that of an uninterrupted one, if all
    randomness in the datasets comes from the global generators of torch, numpy and `random`, and if the head of
    `backbone` was made after seeding: it is trained from the values that it has. The global generators are seeded.

    Args:
        backbone: Image classifier of transformers that returns loss and logits; changed in place, as PEFT does.
        config: Adapter to train. None is a linear probe: nothing but the classification head is trained, and stored
            as an adapter of PEFT without target layers. If `modules_to_save` is None, the head is trained too,
            whatever the method. `full` trains the whole model and stores it, in `model/`, as a model of transformers.
        train: Training images, all of one size: anything with a length and items
            `{"pixel_values": float tensor (channels, rows, columns), "labels": int}`, such as a list of them.
        evaluation: Images to measure accuracy on, or None.
        options: How to train, and in which folder.
        surroundings: What else decides the result, and is stored beside it.

    Returns:
        The model in eval mode, on the device it was trained on; what `metrics.json` holds; the folder of the adapter.
        If `output_dir` holds the complete run, it is loaded and nothing is trained. Runs on other images are told apart
        by the number of the images and by labels only.

    Raises:
        ValueError: If the backbone has no known head, an item is not what the backbone needs, or `output_dir` holds
            the run of other options, or other files. Of long datasets some items are checked before training, all when
            they are read. `TrainingDivergedError` if the loss is not finite: the last good checkpoint is kept.
        OSError: If something cannot be written: the run goes on from the last complete checkpoint.
    """
    folder = Path(options.output_dir)
    checkpoints, metrics_file = folder / "checkpoints", folder / "metrics.json"
    config = _with_reconstruction(with_head(backbone, config), options)
    result_dir = folder / ("model" if config == "full" else "adapter")
    classes = int(backbone.config.num_labels or 0)
    train_items = CheckedItems("train", train, classes)
    evaluation_items = None if evaluation is None else CheckedItems("evaluation", evaluation, classes)
    chooses = options.select_best or options.patience is not None
    check(evaluation_items or not chooses, "select_best and patience need evaluation images to choose by.")

    surroundings = surroundings or Surroundings()
    arguments = training_arguments(folder, options)
    run = _describe_run(backbone, config, train_items, evaluation_items, options) | _as_json(surroundings.about)
    if options.resume and metrics_file.exists():
        prepare_once(folder, run, options)
        return FinetuneResult(
            _load(backbone, result_dir, arguments.device), json.loads(metrics_file.read_text()), result_dir
        )

    model = make_model(backbone, config, options)
    prepare_once(folder, run, options)  # only now: what cannot be trained deletes nothing
    saver = CheckpointSaver(checkpoints, options)
    average = MovingAverage(model, options.ema, saver.latest) if options.ema else None
    trainer = AdapterTrainer(
        model,  # type: ignore[arg-type]
        arguments,
        train_dataset=train_items,
        eval_dataset=evaluation_items,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(dim=-1),
        callbacks=[*([average] if average else []), saver, *_watchers(folder, options, surroundings)],
        optimizers=(make_optimizer(model, options), None),
    )
    trainer.set_up(model, options, average)
    check(not trainer.is_fsdp_enabled, "finetune trains with DDP only. For FSDP2 use Trainer, see docs/running.md.")
    if not options.progress:
        trainer.remove_callback(PrinterCallback)  # Trainer's substitute for a progress bar
    if saver.stopped:  # early, and was killed after that
        trainer.state = TrainerState.load_from_json(str(Path(str(saver.latest)) / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=saver.latest)
    trainer.remove_callback(saver)
    _take_result(model, saver, average)
    trainer.average = None
    scores = _evaluate_result(trainer, saver) if evaluation_items else {}

    metrics = _describe_result(model, scores, saver, trainer.state.log_history, options)
    with arguments.main_process_first(local=False):
        if arguments.process_index == 0:
            write_folder(result_dir, lambda partial: _save(model.eval(), partial, surroundings))
            write(folder / "log.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in trainer.state.log_history))
            write(metrics_file, json.dumps(metrics, indent=2))
            delete_unneeded(checkpoints, options)
    return FinetuneResult(model.eval(), metrics, result_dir)


def make_model(backbone: PreTrainedModel, config: PeftConfig | Full, options: FinetuneOptions) -> Any:
    """Return what is trained, made from the seed."""
    set_seed(options.seed)
    try:
        model = backbone.requires_grad_(True) if config == "full" else get_peft_model(backbone, config)
    except TypeError as error:  # PEFT does not check the types of its options
        raise ValueError(f"The options of the adapter do not fit: {error}.") from error
    check_terms(model, options)
    return model


def _save(model: Any, folder: Path, surroundings: Surroundings) -> None:
    with quiet_loading():
        model.save_pretrained(str(folder))
    surroundings.write_beside(folder)


def with_head(backbone: nn.Module, config: PeftConfig | Full | None) -> PeftConfig | Full:
    """Return a copy of the configuration that trains the classification head too, unless it says what to train."""
    check(isinstance(backbone, PreTrainedModel), f"backbone must be a transformers model, got {type(backbone)}.")
    is_adapted = any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in backbone.modules())
    check(not is_adapted, "The backbone already has an adapter. Load a fresh one for every run.")
    if config == "full":
        return config
    config = LoraConfig(target_modules=DUMMY_TARGET_MODULES) if config is None else copy.deepcopy(config)
    if getattr(config, "modules_to_save", ()) is None:
        config.modules_to_save = classification_heads(backbone)  # type: ignore[attr-defined]
        check(
            config.modules_to_save,  # type: ignore[attr-defined]
            f"{type(backbone).__name__} has no classification head that gift.backbones knows. Load it with "
            "AutoModelForImageClassification, or name its head in the modules_to_save of the adapter's configuration.",
        )
    return config


def _with_reconstruction(config: PeftConfig | Full, options: FinetuneOptions) -> PeftConfig | Full:
    """Let TOAST keep what the reconstruction term needs, where it is asked for."""
    if options.reconstruction:
        check(isinstance(config, ToastConfig), "reconstruction is a term of TOAST's feedback path: train with TOAST.")
        config.reconstruct = True  # type: ignore[union-attr]
    return config


def _watchers(folder: Path, options: FinetuneOptions, surroundings: Surroundings) -> list[TrainerCallback]:
    """Return what is told how the training goes."""
    watchers: list[TrainerCallback] = []
    if options.tensorboard:
        watchers.append(TensorBoardCallback())
        watchers[-1].logging_dir = str(folder / "tensorboard")  # type: ignore[attr-defined]
    if surroundings.after_epoch is not None:
        watchers.append(EpochWatcher(surroundings.after_epoch))
    return watchers


def _load(backbone: PreTrainedModel, result_dir: Path, device: torch.device) -> PeftModel | PreTrainedModel:
    """Return the result of a complete run, as it was returned then."""
    if result_dir.name == "model":
        model: Any = type(backbone).from_pretrained(str(result_dir))
    else:
        model = PeftModel.from_pretrained(backbone, str(result_dir), is_trainable=True)
    return model.eval().to(device)


def _take_result(model: nn.Module, saver: CheckpointSaver, average: MovingAverage | None) -> None:
    """Let the model hold what the run results in: the last or the best epoch, its parameters or their average."""
    source = saver.best_checkpoint or (Path(saver.latest) if saver.stopped and saver.latest else None)
    if average is not None:
        average.install(None if source is None else source / AVERAGE)
    elif source is not None and isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(source / SAFETENSORS_WEIGHTS_NAME))
    elif source is not None:
        model.load_state_dict(load_file(source / SAFE_WEIGHTS_NAME))


def _evaluate_result(trainer: AdapterTrainer, saver: CheckpointSaver) -> dict[str, float]:
    """Return how well the result predicts, which is logged under the epoch that it is of."""
    if saver.best_checkpoint is not None and saver.best is not None:
        trainer.state.epoch, trainer.state.global_step = float(saver.best["epoch"]), saver.best["step"]
    return trainer.evaluate()


def _describe_run(
    backbone: PreTrainedModel,
    config: PeftConfig | Full,
    train: CheckedItems,
    evaluation: CheckedItems | None,
    options: FinetuneOptions,
) -> dict[str, Any]:
    """Return everything that decides the result, by name, as JSON gives it back; of images their number and labels."""
    described = {f"options.{name}": value for name, value in asdict(options).items() if name not in FREE_OPTIONS}
    # Options that came later stand there only where they do something: a run from before is the same run.
    described = {name: value for name, value in described.items() if name not in LATER or value != LATER[name]}
    settings = {"method": config} if isinstance(config, str) else config.to_dict()
    described |= {f"config.{name}": value for name, value in settings.items()}
    described |= {"train": len(train), "evaluation": len(evaluation or ())}
    labels = json.dumps([items.first_labels for items in (train, evaluation) if items is not None])
    described["labels"] = hashlib.sha256(labels.encode()).hexdigest()
    # A head may be new, and its values are in every checkpoint.
    heads = head_names(backbone)
    digest = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        if not name.startswith(heads):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    described["frozen weights"] = digest.hexdigest()
    return _as_json(described)


def _as_json(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description as JSON gives it back."""
    return json.loads(json.dumps(dict(described), default=lambda it: sorted(it) if isinstance(it, set) else str(it)))


def _describe_result(
    model: nn.Module,
    scores: dict[str, float],
    saver: CheckpointSaver,
    log: list[dict[str, float]],
    options: FinetuneOptions,
) -> dict[str, Any]:
    heads = head_names(model)
    trained = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        "method": _method_of(model),
        "accuracy": scores.get("eval_accuracy"),
        "loss": scores.get("eval_loss"),
        "trained_parameters": sum(trained.values()),
        "trained_parameters_without_head": sum(n for name, n in trained.items() if not is_of_head(name, heads)),
        "seconds": round(saver.seconds(), 3),
        "epochs": round(max((entry["epoch"] for entry in log), default=0)),
        "best_epoch": saver.best["epoch"] if options.select_best and saver.best else None,
        "peak_memory_mb": peak_memory_mb(),
        "seed": options.seed,
        "options": asdict(options) | {"output_dir": str(options.output_dir)},
        "versions": {package: version(package) for package in PACKAGES},
    }


def _method_of(model: nn.Module) -> str:
    if not isinstance(model, PeftModel):
        return "full"
    config = model.active_peft_config
    is_probe = getattr(config, "target_modules", None) == DUMMY_TARGET_MODULES
    return "linear probe" if is_probe else str(config.peft_type.value)  # type: ignore[union-attr]
