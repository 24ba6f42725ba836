"""Networks and data sets that are handed in from Python."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import ddpm_accelerate
import train_iadb
from src.config import UserError, load, read_json
from src.data import ImageConfig, open_given, open_given_points
from src.runs.opened import open_run, open_trained
from src.runtime.processes import same_on_all
from src.sampling import SamplerConfig, build_sampler
from src.training.given import Given
from tests.conftest import ROOT, launch, metrics, refused

CPU = torch.device("cpu")
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)


class Small(nn.Module):
    """The least that is a network: with classes, an embedding of them."""

    def __init__(self, classes: int | None = None, channels: int = 3, out: int | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, out or channels, 3, padding=1)
        self.time, self.dropout = nn.Linear(1, 8), nn.Dropout(0.2)
        self.embedding = nn.Embedding(classes + 1, 8) if classes is not None else None

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.first(x) + self.time(time[:, None].to(x))[:, :, None, None]
        if self.embedding is not None and labels is not None:
            h = h + self.embedding(labels)[:, :, None, None]
        return self.last(self.dropout(torch.tanh(h)))


class Listed(Dataset):
    def __init__(self, items: list[Any], classes: Any = None) -> None:
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def images(count: int = 48, size: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


IMAGE = ImageConfig(size=16)


def pixels_of(dataset: Any, image: ImageConfig = IMAGE) -> np.ndarray:
    opened, _ = open_given(dataset, 0.0, image)
    opened.prepare(image)
    return opened.batch(np.arange(len(opened)), image, np.full((len(opened), 3), 0.5))


def config(script: Any, **sets: Any) -> Any:
    name = {train_iadb: "iadb", ddpm_accelerate: "ddpm"}[script]
    sets = {"steps": 6, "checkpoint.every": 3, "log.every": 1, "log.trackers": [], "image.size": 16, "held_out": 0.2, **sets}
    sets = {**({"preview.calls": [2]} if name == "iadb" else {"preview.sampler.steps": 2}), **sets}
    return load(f"configs/smoke/{name}.json", script.Config, [f"{key}={json.dumps(value)}" for key, value in sets.items()])


def network(seed: int, classes: int | None = 2) -> Small:
    torch.manual_seed(seed)
    return Small(classes)


# ---------------------------------------------------------------------------------------------- the docs


def test_the_docs_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert sum(bool(line) for line in BLOCKS[0].splitlines()) <= 12
    exec(BLOCKS[1], scope := {"__name__": "docs"})
    exec(BLOCKS[0], scope)
    assert scope["x"].shape == (8, 3, 16, 16) and scope["x"].isfinite().all()
    assert metrics(tmp_path / "runs" / "mine")[-1]["step"] == 20
    assert read_json(tmp_path / "runs" / "mine" / "config.json")["data"]["source"] == "python"
    exec(BLOCKS[0].splitlines()[8], scope)  # the same call again
    assert "is finished" in (tmp_path / "runs" / "mine" / "log.txt").read_text().splitlines()[-1]


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("script", [train_iadb, ddpm_accelerate])
def test_a_run_is_stopped_and_goes_on_to_the_bit(tmp_path: Path, script: Any) -> None:
    data = TensorDataset(images(), torch.arange(48) % 2)
    cfg = config(script, label_dropout=0.1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    own_network = network(0)
    before = own_network.first.weight.detach().clone()
    assert script.train(cfg, whole, network=own_network, dataset=data) == 0
    assert not torch.equal(own_network.first.weight, before), "the caller's network is what was trained"

    assert script.train(cfg, cut, stop_at=3, network=network(0), dataset=data) == 0
    assert not (cut / "final").exists()
    assert script.train(cfg, str(cut), network=network(5), dataset=data) == 0, "its weights come from the checkpoint"
    assert "going on at step 3 of 6" in (cut / "log.txt").read_text()
    for file in ("final/ema.safetensors", "checkpoints/step_00000006/optimizer.safetensors"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes()
    facts = read_json(whole / "data.json")
    assert facts["network"] == "python" and facts["class_names"] == ["0", "1"]
    assert facts["images"] + facts["held_out_images"] == 48 and facts["held_out_images"] > 0
    assert "held_out_loss" in metrics(whole)[-1]

    assert "handed in from Python" in refused("sample", whole, "--out", tmp_path / "samples")
    opened = open_trained(whole, CPU, network=network(7))
    ema = load_file(whole / "final" / "ema.safetensors")
    assert torch.equal(opened.network.state_dict()["first.weight"], ema["first.weight"])
    samples = build_sampler(opened, SamplerConfig(solver="euler", steps=3)).draw(0, range(2), [0, 1], device=CPU)
    assert samples.shape == (2, 3, 16, 16) and samples.isfinite().all()
    for other, message in (
        (TensorDataset(images(seed=1), torch.arange(48) % 2), "was trained on"),
        (TensorDataset(images(), torch.arange(48) % 3), "was trained on"),
    ):
        with pytest.raises(UserError, match=message):
            script.train(cfg, whole, network=network(0, 3), dataset=other)
    with pytest.raises(UserError, match="of another architecture"):
        script.train(cfg, whole, network=Wider(), dataset=data)


class Wider(Small):
    def __init__(self) -> None:
        super().__init__(2)
        self.extra = nn.Conv2d(3, 3, 1)


SCRIPT = """
import os, sys, torch
sys.path.insert(0, {root!r})
from tests.test_python import Small, on_two
torch.manual_seed(int(os.environ["RANK"]))  # each process with weights of its own: those of the first count
sys.exit(on_two({run!r}, Small(2)))
"""


def on_two(run: str | Path, own_network: Small) -> int:
    labels = [None if i % 7 == 0 else i % 2 for i in range(48)]
    cfg = config(train_iadb, **{"preview.calls": [1], "steps": 3})
    return train_iadb.train(cfg, run, network=own_network, dataset=Listed(list(zip(images(), labels, strict=True))))


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), run=str(tmp_path / "two")))
    done = launch(tmp_path / "script.py", processes=2)
    assert done.status == 0 and "= 2 x cpu x 1 x 8" in done.out, done.all
    assert on_two(tmp_path / "one", network(0)) == 0
    one, two = ((tmp_path / name / "final" / "ema.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_processes_with_different_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    same_on_all("a")
    monkeypatch.setattr("accelerate.utils.gather_object", lambda _: ["a", "b"])
    with pytest.raises(UserError, match="different data sets"):
        same_on_all("a")


def test_each_of_the_two_may_be_left_out(tmp_path: Path) -> None:
    """A data set for the config's own network, whose run sample.py opens; a network for the config's own data."""
    cfg = config(ddpm_accelerate, steps=1, held_out=0.0)
    assert ddpm_accelerate.train(cfg, tmp_path / "one", dataset=images()) == 0
    assert open_trained(tmp_path / "one", CPU).num_classes is None
    assert "no config can open it" in refused("ddpm_accelerate", "-cfg", tmp_path / "one" / "config.json")
    cfg = config(train_iadb, steps=1)
    assert train_iadb.train(cfg, tmp_path / "two", network=Small(4)) == 0
    assert read_json(tmp_path / "two" / "config.json")["data"]["source"] == "shapes"


def test_a_learned_variance_has_twice_the_channels(tmp_path: Path) -> None:
    sets = {"process.variance": "learned", "process.loss.kind": "hybrid", "held_out": 0.0, "steps": 1}
    cfg = config(ddpm_accelerate, **sets)
    with pytest.raises(UserError, match=r"it should give a tensor \(2, 6, 16, 16\)"):
        ddpm_accelerate.train(cfg, tmp_path / "run", network=Small(), dataset=images())
    assert not (tmp_path / "run").exists()
    assert ddpm_accelerate.train(cfg, tmp_path / "run", network=Small(out=6), dataset=images()) == 0


def test_points_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_iadb, "write_points", lambda *_, **__: None)  # drawings, which take ten seconds

    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.layers(torch.cat([x, time[:, None].to(x)], dim=1))

    words = ["steps=3", "batch_size=32", "log.trackers=[]", "held_out=0.1"]
    cfg = load("configs/points2d_iadb.json", train_iadb.Config, words)
    data = torch.randn(200, 2)
    assert train_iadb.train(cfg, tmp_path / "run", network=Points(), dataset=data) == 0
    facts = read_json(tmp_path / "run" / "data.json")
    assert facts["images"] + facts["held_out_images"] == 200 and 5 < facts["held_out_images"] < 40
    run = open_run(tmp_path / "run", CPU, network=Points())
    samples = build_sampler(run, SamplerConfig(solver="euler", steps=2)).draw(0, range(5), None, device=CPU)
    assert samples.shape == (5, 2)


# ---------------------------------------------------------------------------------------------- what is refused


class Fails(Small):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x


class Tied(Small):
    def __init__(self) -> None:
        super().__init__(2)
        self.other = nn.Conv2d(3, 8, 3)
        self.other.weight = self.first.weight


def test_networks_that_cannot_be_trained(tmp_path: Path) -> None:
    data = TensorDataset(images(), torch.arange(48) % 2)
    for net, message in (
        (lambda x, t: x, "is no torch.nn.Module with parameters"),
        (nn.Identity(), "is no torch.nn.Module with parameters"),
        (Fails(2), r"the network fails at network\(x .*labels=\[0, 2\]\): TypeError"),
        (Small(0), "IndexError"),
        (Small(2, channels=1), "RuntimeError"),
        (Small(2, out=4), r"gives a tensor \(2, 4, 16, 16\); it should give a tensor \(2, 3, 16, 16\)"),
        (Tied(), "one weight under several names"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            train_iadb.train(config(train_iadb, label_dropout=0.1), tmp_path / "run", network=net, dataset=data)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "run").exists()


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield images(1)[0]


class Random(Listed):
    def __getitem__(self, i: int) -> Any:
        return torch.rand(3, 16, 16)


GOOD = images(4)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Listed([]), "the data set is empty"),
        (Endless(), "no length or no items by number"),
        (Random([0] * 5), "another one each time it is read"),
        (Listed([GOOD[0], "a.png"]), "item 1 of the data set is a str; give a tensor, an array or a PIL image"),
        (Listed([GOOD[0], {"image": 1}]), "item 1 of the data set is a dict"),
        (Listed([(GOOD[0], 1, 2)]), "item 0 of the data set has 3 parts"),
        (Listed([GOOD[0].long()]), "item 0 of the data set is of int64; give uint8, or floats"),
        (Listed([GOOD[0].float()]), r"item 0 of the data set has values from 0 to 255; give uint8, or floats in \[0, 1\]"),
        (Listed([GOOD[0] / 255, torch.full((3, 4, 4), float("nan"))]), "item 1 of the data set has values from nan to nan"),
        (Listed([GOOD[0] / 255, torch.full((3, 4, 4), -1.5)]), "item 1 of the data set has values from -1.5"),
        (Listed([torch.zeros(5, 8, 8)]), r"item 0 of the data set has the shape \(5, 8, 8\); give \(C, H, W\) tensors"),
        (Listed([torch.zeros(8)]), r"has the shape \(8,\)"),
        (Listed([torch.zeros(1, 3, 8, 8)]), r"has the shape \(1, 3, 8, 8\)"),
        (Listed([np.zeros((0, 8, 3), np.uint8)]), r"has the shape \(0, 8, 3\)"),
        (Listed([(GOOD[0], 1.5)]), "the label of item 0 of the data set is 1.5; give a whole number from 0"),
        (Listed([(GOOD[0], "cat")]), "the label of item 0 of the data set is 'cat'"),
        (Listed([(GOOD[0], -2)]), "is -2"),
        (Listed([(GOOD[0], True)]), "is True"),
        (Listed([(GOOD[0], torch.ones(2))]), "the label of item 0"),
        (Listed([(GOOD[0], 2)], classes=["a", "b"]), "labels up to 2 and 2 different names"),
    ],
)
def test_data_sets_that_cannot_be_trained_on(dataset: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        open_given(dataset, 0.0, IMAGE)
    assert "\n" not in str(raised.value)


def test_a_data_set_that_breaks_says_where() -> None:
    class Broken(Listed):
        def __getitem__(self, i: int) -> Any:
            raise OSError("the disk is gone\nand more")

    with pytest.raises(UserError, match="item 0 of the data set cannot be read: OSError: the disk is gone$"):
        open_given(Broken([1]), 0.0, IMAGE)


def test_points_that_are_none() -> None:
    for dataset, message in (
        (torch.zeros(3, 3), "item 0 of the data set is no 2-D point"),
        (torch.zeros(3, 2).long(), "is no 2-D point"),
        (Listed([torch.zeros(2), torch.tensor([0.0, float("inf")])]), "item 1 of the data set is not finite"),
    ):
        with pytest.raises(UserError, match=message):
            open_given_points(dataset, 0.0)
    with pytest.raises(UserError, match="leaves one side empty"):
        open_given_points(torch.zeros(3, 2), 1e-9)


# ---------------------------------------------------------------------------------------------- what is read


def test_every_way_to_hand_in_the_same_images_gives_the_same_pixels() -> None:
    raw = images(6)
    lasts = raw.permute(0, 2, 3, 1).numpy()
    wanted = lasts
    ways = {
        "tensor": raw,
        "array": lasts,
        "array with channels first": raw.numpy(),
        "tensor with channels last": torch.from_numpy(lasts.copy()),
        "floats": raw / 255,
        "signed floats": raw / 127.5 - 1,
        "doubles": (raw / 255).double().numpy(),
        "pillow": Listed([Image.fromarray(image) for image in lasts]),
        "alone in a tuple": TensorDataset(raw),
        "with labels": TensorDataset(raw, torch.arange(6)),
        "subset": Subset(TensorDataset(raw), range(6)),
    }
    for name, dataset in ways.items():
        assert np.array_equal(pixels_of(dataset), wanted), name
    grey = ImageConfig(size=16, channels=1)
    assert pixels_of(raw[:, :1], grey).shape == (6, 16, 16, 1) == pixels_of(lasts[..., 0], grey).shape
    assert pixels_of(raw[:, :1]).shape == (6, 16, 16, 3), "grey images are seen as the config says"


def test_images_of_many_sizes_and_of_more_than_fits_are_read_when_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Listed([images(1, size=size)[0] for size in (16, 20, 33)])
    assert pixels_of(sizes).shape == (3, 16, 16, 3)
    in_memory, _ = open_given(images(6), 0.0, IMAGE)
    monkeypatch.setattr("src.data.sources.python.IN_MEMORY_BYTES", 2000)
    read, _ = open_given(images(6), 0.0, IMAGE)
    assert type(in_memory.parts[0]).__name__ == "ArrayImages" and type(read.parts[0]).__name__ == "GivenImages"
    assert in_memory.fingerprint == read.fingerprint
    assert np.array_equal(pixels_of(images(6) / 127.5 - 1), images(6).permute(0, 2, 3, 1).numpy()), "signed all the same"


def test_the_content_is_the_fingerprint() -> None:
    def fingerprint(dataset: Any) -> str:
        return open_given(dataset, 0.0, IMAGE)[0].fingerprint

    base = TensorDataset(images(), torch.arange(48) % 2)
    changed = images()
    changed[47, 2, 15, 15] ^= 1
    others = [
        TensorDataset(changed, torch.arange(48) % 2),
        TensorDataset(images(), torch.arange(48) % 3),
        TensorDataset(images().flip(0), torch.arange(48) % 2),
        TensorDataset(images()[:47], torch.arange(47) % 2),
        Listed([base[i] for i in range(48)], classes=["cat", "dog"]),
    ]
    assert fingerprint(base) == fingerprint(Listed([base[i] for i in range(48)]))
    assert len({fingerprint(base), *map(fingerprint, others)}) == 6


def test_names_of_classes_and_who_is_held_out() -> None:
    items = [(image, None if i == 5 else i % 3) for i, image in enumerate(images())]
    data = Listed(items, classes=["dog", "cat", "ape", "never"])
    train, held = open_given(data, 0.25, IMAGE)
    assert held is not None and train.class_names == held.class_names == ("ape", "cat", "dog", "never")
    numbers = [int(name.removeprefix("item/")) for name in train.names]
    assert [train.class_names[k] if k >= 0 else None for k in train.labels] == [
        None if i == 5 else ["dog", "cat", "ape"][i % 3] for i in numbers
    ]
    assert 4 < len(held) < 20 and not set(train.names) & set(held.names)
    reopened, _ = open_given(data, 0.25, IMAGE)
    assert reopened.names == train.names
    named = Subset(data, range(10))
    assert open_given(named, 0.0, IMAGE)[0].class_names == ("ape", "cat", "dog", "never")


class Odd(Small):
    """A network that does with its input what none should."""

    def __init__(self, how: str) -> None:
        super().__init__(2)
        self.how = how

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.how == "in_place":
            x.mul_(2)
        y = super().forward(x, time, labels)
        return {"nan": y * float("nan"), "no_gradient": y.detach(), "in_place": y}[self.how]


def _odd_networks() -> dict[str, tuple[Any, str]]:
    with torch.device("meta"):
        meta = Small(2)
    frozen, broken = Small(2).requires_grad_(False), Small(2)
    broken.first.weight.data[0] = float("nan")
    lazy = Small(2)
    lazy.first = nn.LazyConv2d(8, 3, padding=1)
    return {
        "lazy": (lazy, "parameters without a shape (it is lazy)"),
        "meta": (meta, "on the meta device"),
        "frozen": (frozen, "there is nothing to train"),
        "broken": (broken, "27 of the 216 numbers of first.weight are not finite"),
        "nan": (Odd("nan"), "gives NaN or infinity"),
        "no_gradient": (Odd("no_gradient"), "gives a tensor without a gradient"),
        "in_place": (Odd("in_place"), "changes x in place"),
    }


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", ["lazy", "meta", "frozen", "broken", "nan", "no_gradient", "in_place"])
def test_networks_that_give_what_none_should(name: str) -> None:
    given, words = _odd_networks()[name]
    with pytest.raises(UserError) as error:
        Given(given).build(config(ddpm_accelerate, label_dropout=0.1), Accelerator(cpu=True), (3, 16, 16), 2)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_labels_and_lengths_that_nothing_can_be_built_of() -> None:
    far = Listed([(torch.zeros(3, 16, 16), 2**40 * i) for i in range(3)])
    with pytest.raises(UserError, match="3 items and labels up to 2199023255552: number the classes from 0, without gaps"):
        open_given(far, 0.0, IMAGE)

    class Negative(Listed):
        def __len__(self) -> int:
            return -1

    with pytest.raises(UserError, match="the length of the data set cannot be read: ValueError"):
        open_given(Negative([]), 0.0, IMAGE)


@pytest.mark.parametrize("cfg", ["configs/smoke/iadb.json", {"name": "x"}, train_iadb.Config])
def test_what_is_no_config(tmp_path: Path, cfg: Any) -> None:
    with pytest.raises(UserError, match="hand in what load\\(FILE, Config\\) gives"):
        train_iadb.train(cfg, tmp_path / "run", network=Small())
    assert not (tmp_path / "run").exists()
