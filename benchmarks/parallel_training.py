"""Trainings of 20 steps on two processes against the same training on one: DDP and FSDP2, torchrun and Trainer.

Every way trains a small transformers ViT on the same global batches, in float64 and without augmentation. Its adapter
is saved in the form that users load, loaded again in one process, and compared there.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from documents import replace_between
from interleaved import environment, write_json
from parallel import leave
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTConfig
from transformers.distributed import DistributedConfig

from gift import FinetuneOptions, GiftConfig, finetune

STEPS, BATCH, PROCESSES, RATE = 20, 8, 2, 1e-2
TOLERANCE = 1e-5
START, END = "<!-- trainings: benchmarks/parallel_training.py --write-docs FILE -->", "<!-- end of trainings -->"
WHOLE_ADAPTER = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_backbone(**options: Any) -> nn.Module:
    """Return the ViT that the first process saved; `options` are those of `from_pretrained`."""
    return AutoModelForImageClassification.from_pretrained(os.environ["BACKBONE"], dtype=torch.float64, **options)


def save_backbone(folder: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)


def adapt(backbone: nn.Module, with_head: bool) -> PeftModel:
    torch.manual_seed(1)
    options = {} if with_head else {"modules_to_save": []}
    return get_peft_model(backbone, GiftConfig(r=4, num_clusters=6, generator_dtype="float64", **options))


def make_data() -> list[dict[str, Any]]:
    noise = torch.Generator().manual_seed(2)
    images = torch.randn(STEPS * BATCH // 2, 3, 32, 32, generator=noise, dtype=torch.float64)
    return [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(images)]


# ---- by a loop of one's own ------------------------------------------------------------------------------------------


def alone(model: PeftModel) -> nn.Module:
    return model


def ddp(model: PeftModel) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: PeftModel) -> nn.Module:
    for block in model.base_model.model.vit.layers:
        fully_shard(block)
    return fully_shard(model)


def train_in_loop(wrap: Callable[[PeftModel], nn.Module], folder: Path) -> None:
    model = adapt(make_backbone(), with_head=True)
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=RATE)
    data = make_data() * 2
    for step in range(STEPS):
        batch = data[step * BATCH : (step + 1) * BATCH]
        if wrap is not alone:
            batch = batch[dist.get_rank() :: PROCESSES]
        images = torch.stack([item["pixel_values"] for item in batch])
        labels = torch.tensor([item["labels"] for item in batch])
        optimizer.zero_grad()
        wrapped(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
    save(model, folder)


def save(model: PeftModel, folder: Path) -> None:
    """Save the adapter as README says: gather on all processes, write on the first."""
    state = get_model_state_dict(model, options=WHOLE_ADAPTER) if dist.is_initialized() else None
    if not dist.is_initialized() or dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)


# ---- by Trainer ------------------------------------------------------------------------------------------------------


def arguments_of_trainer(folder: Path, **options: Any) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // processes,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **options,
    )


def train_by_trainer(model: PeftModel, arguments: TrainingArguments) -> None:
    trainer = Trainer(model, arguments, train_dataset=make_data())
    trainer.train()
    trainer.save_model()


def trainer_alone(folder: Path) -> None:
    train_by_trainer(adapt(make_backbone(), with_head=True), arguments_of_trainer(folder))


def trainer_alone_without_head(folder: Path) -> None:
    train_by_trainer(adapt(make_backbone(), with_head=False), arguments_of_trainer(folder))


def by_finetune(folder: Path) -> None:
    """Take the same number of steps as an epoch of 10 and another one, with checkpoints and an evaluation."""
    epochs = STEPS * BATCH // len(make_data())
    options = FinetuneOptions(folder, epochs=epochs, batch_size=BATCH, learning_rate=RATE, progress=False)
    config = GiftConfig(r=4, num_clusters=6, generator_dtype="float64")
    finetune(make_backbone(), config, make_data(), make_data()[:9], options)


def trainer_fsdp2(folder: Path) -> None:
    """Let accelerate shard the model; it does so on accelerators only, so its state is told that this is one."""
    plugin = {
        "fsdp_version": 2,
        "transformer_layer_cls_to_wrap": ["ViTLayer"],
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    }
    arguments = arguments_of_trainer(folder, fsdp=True, fsdp_config=plugin)
    Accelerator(cpu=True)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    train_by_trainer(adapt(make_backbone(), with_head=True), arguments)


def trainer_fsdp2_at_load_time(folder: Path) -> None:
    """Let transformers shard the backbone while it is loaded; the adapter is a plain copy in every process."""
    arguments = arguments_of_trainer(folder)
    config = DistributedConfig(fsdp_size=PROCESSES, fsdp_plan={"vit.layers.*": "free_full_weight"})
    train_by_trainer(adapt(make_backbone(distributed_config=config), with_head=False), arguments)


# ---- comparing -------------------------------------------------------------------------------------------------------

LOOPS = {"loop, one process": alone, "loop, DDP": ddp, "loop, FSDP2": fsdp2}
TRAINERS: dict[str, Callable[[Path], None]] = {
    "Trainer, one process": trainer_alone,
    "Trainer, one process, no head": trainer_alone_without_head,
    "finetune, one process": by_finetune,
    "finetune, DDP": by_finetune,
    "Trainer, DDP": trainer_alone,
    "Trainer, FSDP2 at load time, no head": trainer_fsdp2_at_load_time,
    "Trainer, FSDP2 by accelerate": trainer_fsdp2,  # the last one: it changes accelerate's state
}
REFERENCES = {
    "loop, DDP": "loop, one process",
    "loop, FSDP2": "loop, one process",
    "finetune, DDP": "finetune, one process",
    "Trainer, DDP": "Trainer, one process",
    "Trainer, FSDP2 by accelerate": "Trainer, one process",
    "Trainer, FSDP2 at load time, no head": "Trainer, one process, no head",
}


def work(ways: list[str], folder: Path) -> None:
    """Train in the given ways, as one of the processes of a launch."""
    torch.set_num_threads(1)
    if "RANK" in os.environ and ways[0] in LOOPS:
        dist.init_process_group("gloo")
    for way in ways:
        if way in LOOPS:
            train_in_loop(LOOPS[way], folder / way)
        else:
            TRAINERS[way](folder / way)
    if dist.is_initialized():
        leave()


def launch(ways: list[str], processes: int, folder: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = [*(torchrun if processes > 1 else []), __file__, "--folder", str(folder), "--work", *ways]
    finished = subprocess.run([sys.executable, *program], capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{', '.join(ways)} failed:\n{finished.stdout}\n{finished.stderr}")


def logits_of(model: nn.Module) -> Tensor:
    images = torch.stack([item["pixel_values"] for item in make_data()[:4]])
    with torch.no_grad():
        return model.double().eval()(pixel_values=images).logits


def load(folder: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Return the stored tensors of an adapter, and the logits of the backbone with it, in this process."""
    folder = folder / "adapter" if (folder / "adapter").is_dir() else folder
    model = PeftModel.from_pretrained(make_backbone(), folder)
    return load_file(folder / "adapter_model.safetensors"), logits_of(model)


def compare(folder: Path) -> dict[str, dict[str, float]]:
    """Return for every way of two processes the largest differences to one process: tensors and logits."""
    start = logits_of(make_backbone())
    results = {}
    for way, reference in REFERENCES.items():
        tensors, logits = load(folder / way)
        expected, expected_logits = load(folder / reference)
        if tensors.keys() != expected.keys():
            sys.exit(f"{way} stored other tensors than {reference}: {sorted(tensors.keys() ^ expected.keys())}")
        worst = max((tensors[name] - expected[name]).abs().max().item() for name in expected)
        logits_worst, moved = ((logits - other).abs().max().item() for other in (expected_logits, start))
        results[way] = {
            "reference": reference,
            "largest_difference": worst,
            "largest_difference_of_logits": logits_worst,
            "logits_moved_by": moved,
        }
    return results


def table(ways: dict[str, dict[str, Any]]) -> str:
    lines = [f"| {STEPS} steps | largest difference of a number | of a logit | logits moved by |", "|---|---|---|---|"]
    for way, measured in ways.items():
        differences = f"{measured['largest_difference']:.0e} | {measured['largest_difference_of_logits']:.0e}"
        lines.append(f"| {way} | {differences} | {measured['logits_moved_by']:.2f} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    example = "example: python benchmarks/parallel_training.py --out results/parallel_training.json"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], epilog=example)
    parser.add_argument("--out", type=Path, help="JSON file for the differences")
    parser.add_argument("--write-docs", type=Path, metavar="MD", help="put the table between the markers of this file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.work:
        work(arguments.work, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["BACKBONE"] = str(folder / "backbone")
        os.environ["OMP_NUM_THREADS"] = "1"
        save_backbone(folder / "backbone")
        launch(list(LOOPS), PROCESSES, folder)
        launch(list(TRAINERS)[:3], 1, folder)
        launch(list(TRAINERS)[3:], PROCESSES, folder)
        results = compare(folder)
    print(table(results))
    if arguments.write_docs is not None:
        replace_between(arguments.write_docs, START, END, table(results))
    if arguments.out is not None:
        options = {"steps": STEPS, "global_batch": BATCH, "processes": PROCESSES, "tolerance": TOLERANCE}
        write_json(arguments.out, {"environment": environment(), "options": options, "ways": results})
    wrong = [way for way, measured in results.items() if measured["largest_difference"] > TOLERANCE]
    sys.exit(f"More than {TOLERANCE}: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
