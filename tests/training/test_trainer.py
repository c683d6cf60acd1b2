"""The loop: resuming repeats, accumulation averages, and trouble is one line with the last checkpoint intact."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blip2.configs import LanguageConfig, LoraConfig, LossConfig, OptimConfig, RunConfig, TrainConfig
from blip2.data.batch import Batch
from blip2.errors import Blip2Error, CheckpointError, RunError
from blip2.models.freezing import freeze, is_adapter
from blip2.training import checkpoint, run_log
from blip2.training.objectives.stage1 import Stage1Objective
from blip2.training.objectives.stage2 import Stage2Objective
from blip2.training.optim import learning_rate
from blip2.training.trainer import Trainer
from blip2.weights import lazy_tensors
from blip2.weights.lazy_tensors import read_safetensors
from blip2.weights.runs import open_run

CPU = torch.device("cpu")
Source = Callable[[int], Iterator[Batch]]


@pytest.fixture(autouse=True)
def no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "_tensorboard", lambda folder, step: None)


class Regression(nn.Module):
    """An objective of one layer on the mean feature; the mean over pairs, as a stage-2 loss is."""

    def __init__(self, frozen: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layer = nn.Linear(6, 2)
        if frozen is not None:
            self.model.vision = frozen

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        assert batch.features is not None
        return {"mse": (self.model.layer(batch.features.mean(dim=1)) - 1).square().mean()}


def config(steps: int = 6, **train: Any) -> RunConfig:
    return RunConfig(
        optim=OptimConfig(lr=1e-2, min_lr=1e-3, warmup=2),
        train=TrainConfig(
            **{"steps": steps, "batch": 8, "save_every": 2, "eval_every": 2, "precision": "fp32"} | train
        ),
    )


def stream(tiny: Any, change: Callable[[int, Batch], None] = lambda step, batch: None) -> Source:
    """Batches as a function of the step; `change` is called on each before it is given."""

    def batches(step: int) -> Iterator[Batch]:
        while True:
            batch = tiny.batch(8, seed=step)
            change(step, batch)
            yield batch
            step += 1

    return batches


def lines(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of run_log.jsonl without what a clock decides."""
    clock = ("pairs_per_s", "data_wait", "time")
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in read if line["kind"] == kind]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class KilledError(Exception):
    """Stands for `kill -9`: nothing of ours catches it."""


def stage1_trainer(tiny: Any, folder: Path, source: Source, **train: Any) -> Trainer:
    """Stage 1 with dropout on, so that its seeding counts."""
    folder.mkdir(exist_ok=True)
    objective = Stage1Objective(tiny.stage1(dropout=0.2), tiny.tokenizer, LossConfig(), seed=5)
    return Trainer(objective, source, config(**train), folder, device=CPU)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_repeats_one_that_was_never_stopped(tiny: Any, tmp_path: Path, accumulate: int) -> None:
    """KilledError in step 6 after a checkpoint at 4: the same losses, norms and weights to the last bit."""
    torch.manual_seed(1)
    whole = stage1_trainer(tiny, tmp_path / "whole", stream(tiny), accumulate=accumulate)
    assert whole.run().step == 6

    def kill(step: int, batch: Batch) -> None:
        if step == 5:
            raise KilledError

    torch.manual_seed(1)
    broken = stage1_trainer(tiny, tmp_path / "broken", stream(tiny, kill), accumulate=accumulate)
    with pytest.raises(KilledError):
        broken.run()
    assert len(lines(tmp_path / "broken")) == 5
    torch.manual_seed(2)  # another process starts from other random numbers
    again = stage1_trainer(tiny, tmp_path / "broken", stream(tiny), accumulate=accumulate)
    assert again.resume() == 4
    assert again.run().step == 6
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert_equal(weights(again.model), weights(whole.model))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_adapters_train_are_saved_and_resume(tiny: Any, tmp_path: Path, kind: str) -> None:
    """Stage 2 with LoRA and its dropout, the language model among the frozen parts: killed and resumed
    as above."""
    pytest.importorskip("peft", reason="peft is not installed")
    from blip2.models.language.lora import add_lora

    def trainer(name: str, source: Source) -> Trainer:
        torch.manual_seed(1)
        model = tiny.stage2(kind)
        add_lora(model.language_model, LoraConfig(rank=2, dropout=0.3))
        (tmp_path / name).mkdir(exist_ok=True)
        objective = Stage2Objective(model, tiny.tokenizer, LanguageConfig(prompt="some"), seed=5)
        return Trainer(objective, source, config(), tmp_path / name, device=CPU, frozen=[model.language_model])

    def kill(step: int, batch: Batch) -> None:
        if step == 5:
            raise KilledError

    whole = trainer("whole", stream(tiny))
    start = weights(whole.objective)
    assert whole.run().step == 6
    changed = {name for name, value in weights(whole.objective).items() if not torch.equal(value, start[name])}
    assert changed == {name for name, p in whole.objective.named_parameters() if p.requires_grad}
    assert any(map(is_adapter, changed))
    with pytest.raises(KilledError):
        trainer("broken", stream(tiny, kill)).run()
    again = trainer("broken", stream(tiny))
    assert again.resume() == 4
    again.run()
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert_equal(weights(again.objective), weights(whole.objective))


def test_a_new_run_resumes_nothing_and_a_finished_one_does_nothing(tiny: Any, tmp_path: Path) -> None:
    first = Trainer(Regression(), stream(tiny), config(4), tmp_path, device=CPU)
    assert first.resume() == 0
    first.run()
    again = Trainer(Regression(), stream(tiny), config(4), tmp_path, device=CPU)
    assert again.resume() == 4
    before = (tmp_path / "metrics.jsonl").read_text()
    outcome = again.run()
    assert (outcome.step, outcome.interrupted) == (4, None)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_every_step_is_logged_with_what_it_did(tiny: Any, tmp_path: Path) -> None:
    trainer = Trainer(Regression(), stream(tiny), config(4), tmp_path, device=CPU)
    trainer.run()
    read = lines(tmp_path)
    assert [line["step"] for line in read] == [1, 2, 3, 4]
    assert [line["lr"] for line in read] == [learning_rate(n, 4, trainer.config.optim) for n in range(4)]
    assert all(line["loss"] == line["mse"] > 0 and line["grad_norm"] > 0 for line in read)
    raw = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert raw["pairs_per_s"] == pytest.approx(8 / raw["time"])
    assert 0 <= raw["data_wait"] <= 1


def test_a_plain_loop_gives_the_same_weights(tiny: Any, tmp_path: Path) -> None:
    """AdamW, clipping and schedule written out; float32 rounding only."""
    trainer = Trainer(Regression(), stream(tiny), config(5), tmp_path, device=CPU)
    trainer.run()
    plain = Regression()
    layer = plain.model.layer
    optim = trainer.config.optim
    optimizer = torch.optim.AdamW(
        [{"params": [layer.weight], "weight_decay": 0.05}, {"params": [layer.bias], "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 5, optim)
        optimizer.zero_grad()
        plain(tiny.batch(8, seed=step), step)["mse"].backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(trainer.objective.state_dict(), plain.state_dict())


def test_accumulated_micro_batches_equal_one_batch(tiny: Any, tmp_path: Path) -> None:
    """For a mean over pairs; sums are taken in another order, hence float32's tolerance."""
    results = []
    for parts in (1, 2, 4):
        (folder := tmp_path / str(parts)).mkdir()
        trainer = Trainer(Regression(), stream(tiny), config(accumulate=parts), folder, device=CPU)
        trainer.run()
        results.append((lines(folder), weights(trainer.objective)))
    for read, state in results[1:]:
        for mine, whole in zip(read, results[0][0], strict=True):
            assert mine == pytest.approx(whole, rel=1e-5) if "kind" not in mine else True
            assert mine["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
        torch.testing.assert_close(state, results[0][1])


def test_clipping_bounds_the_step_and_none_does_not(tiny: Any, tmp_path: Path) -> None:
    norms = []
    for number, clip in enumerate((None, 1e-3)):
        (folder := tmp_path / str(number)).mkdir()
        base = config(1)
        trainer = Trainer(
            Regression(), stream(tiny), replace(base, optim=replace(base.optim, clip=clip)), folder, device=CPU
        )
        trainer._backward(tiny.batch(8))
        trainer._clip()
        norms.append(torch.stack([p.grad.norm() for p in trainer.objective.parameters()]).norm().item())
    assert norms[0] > 1e-2
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)


def test_evaluations_come_at_the_start_on_time_and_at_the_end(tiny: Any, tmp_path: Path) -> None:
    modes: list[tuple[int, bool, bool]] = []
    objective = Regression()

    def evaluate(step: int) -> dict[str, Any]:
        modes.append((step, objective.training, torch.is_grad_enabled()))
        return {"recall": step / 10}

    Trainer(objective, stream(tiny), config(5), tmp_path, device=CPU, evaluate=evaluate).run()
    assert modes == [(step, False, False) for step in (0, 2, 4, 5)]
    measured = [(line["step"], line["recall"]) for line in lines(tmp_path, "dev")]
    assert measured == [(0, 0.0), (2, 0.2), (4, 0.4), (5, 0.5)]


def test_evaluation_does_not_disturb_training(tiny: Any, tmp_path: Path) -> None:
    """It may draw as many random numbers as it likes."""
    finals = []
    for name, evaluate in {"with": lambda step: {"noise": float(torch.rand(()))}, "without": None}.items():
        torch.manual_seed(1)
        trainer = stage1_trainer(tiny, tmp_path / name, stream(tiny))
        trainer.evaluate = evaluate
        trainer.run()
        finals.append(weights(trainer.objective))
    assert_equal(*finals)


def poisoned(step: int, batch: Batch) -> None:
    if step == 4:
        assert batch.features is not None
        batch.features[3] = torch.nan


def test_a_loss_that_is_not_finite_stops_with_the_keys(tiny: Any, tmp_path: Path) -> None:
    trainer = Trainer(Regression(), stream(tiny, poisoned), config(), tmp_path, device=CPU)
    with pytest.raises(RunError) as caught:
        trainer.run()
    message = str(caught.value)
    assert message.startswith("step 5: the loss is not finite (mse nan); batch: photo4-0, photo4-1, photo4-2")
    assert message.endswith("step-000004 is intact")
    assert "\n" not in message
    assert trainer.step == 4
    saved = read_safetensors(tmp_path / "checkpoints" / "step-000004" / "model.safetensors")
    assert_equal(weights(trainer.model), saved)  # type: ignore[arg-type]
    assert len(lines(tmp_path)) == 4


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tiny: Any, tmp_path: Path) -> None:
    """The loss is 0, its derivative is 0 x infinity."""

    class Root(Regression):
        def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
            return {"root": (super().forward(batch, step)["mse"] * 0).sqrt()}

    trainer = Trainer(Root(), stream(tiny), config(), tmp_path, device=CPU)
    before = weights(trainer.objective)
    message = r"^step 1: the gradient is not finite \(nan\); batch: photo0-0, .*no checkpoint"
    with pytest.raises(RunError, match=message):
        trainer.run()
    assert_equal(weights(trainer.objective), before)


def test_a_full_disk_is_one_line(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replacing = lazy_tensors.replacing

    def full(target: Path, *, sync: bool) -> Any:
        if "000004" in str(target):
            raise OSError(28, "No space left on device")
        return replacing(target, sync=sync)

    monkeypatch.setattr(lazy_tensors, "replacing", full)
    trainer = Trainer(Regression(), stream(tiny), config(), tmp_path, device=CPU)
    with pytest.raises(CheckpointError, match=r"No space left on device; step-000002 is intact$") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    again = Trainer(Regression(), stream(tiny), config(), tmp_path, device=CPU)
    assert again.resume() == 2


def test_data_that_vanishes_is_one_line(tiny: Any, tmp_path: Path) -> None:
    def vanish(step: int, batch: Batch) -> None:
        if step == 3:
            raise FileNotFoundError(2, "No such file or directory", "train-000.tar")

    trainer = Trainer(Regression(), stream(tiny, vanish), config(), tmp_path, device=CPU)
    with pytest.raises(RunError, match=r"^train-000.tar: No such file or directory; step-000002 is intact$"):
        trainer.run()


def test_a_run_folder_that_cannot_be_written_is_one_line(tiny: Any, tmp_path: Path) -> None:
    (folder := tmp_path / "run").write_text("a file in the way")
    trainer = Trainer(Regression(), stream(tiny), config(), folder, device=CPU)
    with pytest.raises(Blip2Error, match=r"run/metrics\.jsonl: Not a directory; no checkpoint had been written yet$"):
        trainer.run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_reports(tiny: Any, tmp_path: Path, number: signal.Signals) -> None:
    def tell(step: int, batch: Batch) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    trainer = Trainer(Regression(), stream(tiny, tell), config(save_every=100), tmp_path, device=CPU)
    outcome = trainer.run()
    assert (outcome.step, outcome.interrupted) == (3, number)
    assert signal.getsignal(number) == before
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "step-000003"
    whole = Trainer(Regression(), stream(tiny), config(), tmp_path, device=CPU)
    assert whole.resume() == 3
    assert whole.run().interrupted is None
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_signal_during_an_evaluation_saves_too(tiny: Any, tmp_path: Path) -> None:
    def evaluate(step: int) -> dict[str, Any]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    trainer = Trainer(Regression(), stream(tiny), config(save_every=100), tmp_path, device=CPU, evaluate=evaluate)
    outcome = trainer.run()
    assert outcome.interrupted == signal.SIGINT
    last = checkpoint.newest(tmp_path)
    assert last is not None
    assert last.name == f"step-{outcome.step:06d}"
    assert outcome.step < 6


def test_a_second_signal_stops_at_once(tiny: Any, tmp_path: Path) -> None:
    def tell(step: int, batch: Batch) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    trainer = Trainer(Regression(), stream(tiny, tell), config(), tmp_path, device=CPU)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.step == 1


def test_a_frozen_part_that_changes_stops_the_run(tiny: Any, tmp_path: Path) -> None:
    frozen = nn.Linear(2, 2)
    freeze(frozen)
    objective = Regression(frozen)

    def spoil(step: int, batch: Batch) -> None:
        if step == 3:
            with torch.no_grad():
                frozen.weight[0, 0] += 1e-3

    trainer = Trainer(objective, stream(tiny, spoil), config(), tmp_path, device=CPU, frozen=[frozen])
    with pytest.raises(RunError, match="a frozen part changed during training"):
        trainer.run()


def test_a_frozen_part_that_trains_stops_after_the_first_step(tiny: Any, tmp_path: Path) -> None:
    part = nn.Linear(2, 2)  # not frozen
    trainer = Trainer(Regression(part), stream(tiny), config(), tmp_path, device=CPU, frozen=[part])
    with pytest.raises(RunError, match="must stay frozen"):
        trainer.run()
    assert trainer.step == 0


def test_a_frozen_part_that_stays_is_no_reason_to_stop(tiny: Any, tmp_path: Path) -> None:
    frozen = nn.Linear(2, 2)
    freeze(frozen)
    trainer = Trainer(Regression(frozen), stream(tiny), config(), tmp_path, device=CPU, frozen=[frozen])
    assert trainer.run().step == 6
    saved = read_safetensors(tmp_path / "checkpoints" / "step-000006" / "model.safetensors")
    assert set(saved) == {"layer.weight", "layer.bias"}


def test_the_best_of_dev_is_kept_and_survives_a_resume(tmp_path: Path, tiny: Any) -> None:
    """Recall of 10, 30, 20, 40 at steps 0, 2, 4, 6; a loss goes the other way."""
    recalls = {0: 10.0, 2: 30.0, 4: 20.0, 6: 40.0}
    losses = {0: 3.0, 2: 1.0, 4: 2.0, 6: 1.5}

    def trained(steps: int, folder: Path, best: str) -> Any:
        base = config(steps, keep=9)
        folder.mkdir(exist_ok=True)
        run = replace(base, eval=replace(base.eval, best=best))

        def evaluate(step: int) -> dict[str, Any]:
            return {"recall": recalls[step], "loss": losses[step]}

        trainer = Trainer(Regression(), stream(tiny), run, folder, device=CPU, evaluate=evaluate)
        trainer.resume()
        trainer.run()
        return json.loads((folder / "best" / "score.json").read_text())

    first = trained(4, tmp_path, "recall")
    assert first == {"step": 2, "metric": "recall", "score": 30.0}
    kept = read_safetensors(tmp_path / "best" / "model.safetensors")
    assert_equal(kept, read_safetensors(tmp_path / "checkpoints" / "step-000002" / "model.safetensors"))
    assert open_run(tmp_path).weights == tmp_path / "best" / "model.safetensors"
    recalls[6] = 25.0
    assert trained(6, tmp_path, "recall") == first
    recalls[6] = 40.0
    assert trained(6, tmp_path / "whole", "recall") == {"step": 6, "metric": "recall", "score": 40.0}
    assert trained(6, tmp_path / "loss", "loss") == {"step": 2, "metric": "loss", "score": -1.0}
