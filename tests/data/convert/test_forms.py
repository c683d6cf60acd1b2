"""Annotation files as people have them: read by a converter of their name, and a line for any other."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip2.cli.main import main
from blip2.data.convert.readers import READERS
from blip2.data.sources import open_collection
from blip2.errors import DataError

NAME = "COCO_val2014_000000000007.jpg"
URL = f"https://example.org/photos/{NAME}"


def dump(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), "utf-8")
    return path


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")
    return path


def _coco(folder: Path) -> Path:
    return dump(
        folder / "captions_val2014.json",
        {"images": [{"id": 7, "file_name": NAME}], "annotations": [{"image_id": 7, "caption": "a cat"}]},
    )


def _karpathy(folder: Path) -> Path:
    image = {"filename": NAME, "split": "train", "cocoid": 7, "sentences": [{"raw": "a cat"}]}
    return dump(folder / "dataset_coco.json", {"images": [image], "dataset": "coco"})


def _vqa(folder: Path) -> Path:
    answers = [{"answer": "cat", "answer_id": n} for n in range(10)]
    dump(folder / "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_id": 1, "answers": answers}]})
    return dump(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {"data_subtype": "val2014", "questions": [{"question_id": 1, "image_id": 7, "question": "what?"}]},
    )


def _gqa(folder: Path) -> Path:
    stem = NAME.removesuffix(".jpg")
    return dump(
        folder / "testdev_balanced_questions.json", {"2": {"imageId": stem, "question": "what?", "answer": "cat"}}
    )


def _genome(folder: Path) -> Path:
    shutil.copy(folder / NAME, folder / "7.jpg")
    region = {"x": 0, "y": 0, "width": 5, "height": 5, "phrase": "a cat"}
    return dump(folder / "region_descriptions.json", [{"id": 7, "regions": [region]}])


def _folder(folder: Path) -> Path:
    (folder / "album").mkdir()
    shutil.copy(folder / NAME, folder / "album" / "a.jpg")
    (folder / "album" / "a.txt").write_text("a cat")
    return folder / "album"


def _shards(folder: Path) -> Path:
    source = lines(folder / "for_shards.jsonl", {"image": NAME, "captions": ["a cat"]})
    assert main(["data", "convert", str(source), str(folder / "shards"), "--from", "jsonl", "--json"]) == 0
    source.unlink()
    return folder / "shards"


def _imagefolder(folder: Path) -> Path:
    (folder / "hub").mkdir()
    shutil.copy(folder / NAME, folder / "hub" / NAME)
    lines(folder / "hub" / "metadata.jsonl", {"file_name": NAME, "text": "a cat"})
    return folder / "hub"


def _text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content, "utf-8")
        return folder / name

    return make


# A file of each form, and the kinds that read it; the first is the one that a message names.
_LISTS = ("lavis", "albef", "table")
_WEB = ("laion", "cc3m", "cc12m", "sbu", "blip")
CAPTION_LIST = [{"image": f"val2014/{NAME}", "caption": "a cat", "image_id": "coco_7"}]
QUESTION_LIST = [{"image": f"val2014/{NAME}", "question": "what?", "answer": ["cat", "pet"], "question_id": 3}]
FORMS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "COCO's own": (_coco, ("coco", "nocaps", "flickr30k")),
    "Karpathy's": (_karpathy, ("coco", "flickr30k", "nocaps")),
    "VQAv2": (_vqa, ("vqav2", "okvqa")),
    "GQA": (_gqa, ("gqa",)),
    "Visual Genome": (_genome, ("vg",)),
    "tokens": (_text("results_20130124.token", f"{NAME}#0\ta cat\n"), ("flickr30k",)),
    "LAVIS's captions": (
        lambda folder: dump(folder / "coco_karpathy_train.json", CAPTION_LIST),
        (*_LISTS, "coco", "flickr30k", "nocaps", "vg"),
    ),
    "LAVIS's questions": (lambda folder: dump(folder / "vqa_train.json", QUESTION_LIST), _LISTS),
    "BLIP's list": (
        lambda folder: dump(folder / "ccs_filtered.json", [{"url": URL, "caption": "a cat"}]),
        _WEB,
    ),
    "SBU": (lambda folder: dump(folder / "sbu.json", {"image_urls": [URL], "captions": ["a cat"]}), ("sbu", *_WEB)),
    "CC3M": (_text("Train_GCC.tsv", f"a cat\t{URL}\n"), _WEB),
    "tar shards": (_shards, _WEB),
    "JSON lines": (
        lambda folder: lines(folder / "set.jsonl", {"image": NAME, "captions": ["a cat"]}),
        ("jsonl", "imagefolder", "table", "lavis", "albef"),
    ),
    "a folder with metadata": (_imagefolder, ("imagefolder",)),
    "CSV": (_text("pairs.csv", f"filepath,title\n{NAME},a cat\n"), ("table", "imagefolder", "lavis", "albef")),
    "Flickr30k's CSV": (
        _text("results.csv", f"image_name| comment_number| comment\n{NAME}| 0| a cat\n"),
        ("table", "flickr30k"),
    ),
    "a folder": (_folder, ("folder", *_WEB)),
}
UNKNOWN: dict[str, bytes] = {
    "empty.json": b"",
    "no_list.json": b'{"sounds": ["a"], "n": 3}',
    "empty_list.json": b"[]",
    "number.json": b"3",
    "texts.json": b'["a", "b"]',
    "nulls.json": b"[null, null]",
    "cut.json": b'[{"image": "a.jpg", "capt',
    "deep.json": b"[" * 100_000,
    "words.txt": b"one two\nthree\n",
    "binary.bin": bytes(range(256)) * 8,
    "nul.csv": b"image,caption\n\0,\0\n",
    "book.xlsx": b"PK\x03\x04" + bytes(64),
    "cut.json.gz": gzip.compress(b"[]" * 500)[:30],
    "table.parquet": b"PAR1" + bytes(64) + b"PAR1",
    "boxes.json": b'{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": [1]}]}',
    "infinite.json": b'{"questions": [{"question_id": 1, "image_id": Infinity, "question": "q"}], "data_subtype": "t"}',
}
# Names of data sets, for which no one is to be blamed who did not name them.
_SETS = {"coco": "COCO", "vqav2": "VQA", "okvqa": "VQA", "gqa": "GQA", "vg": "Visual Genome", "sbu": "SBU"} | {
    "flickr30k": "Flickr30k",
    "nocaps": "NoCaps",
}


@pytest.fixture
def place(tmp_path: Path, draw_image: Callable[..., Path]) -> Path:
    """A folder with one image, in a folder with a neutral name."""
    draw_image(tmp_path / "in" / NAME, 7)
    return tmp_path / "in"


def convert(source: Path, out: Path, kind: str, *more: str) -> int:
    return main(["data", "convert", str(source), str(out), "--from", kind, "--json", *more])


def require_line(error: str, kind: str) -> None:
    """One line that blames no data set but the named one."""
    assert error.startswith("blip2: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    blamed = error.partition(": not ")[2] + error.partition(": no ")[2]
    assert not [name for other, name in _SETS.items() if name in blamed and _SETS.get(kind) != name], error


@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_every_kind(form: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, kinds = FORMS[form]
    source = make(place)
    capsys.readouterr()
    codes = {}
    for kind in READERS:
        codes[kind] = convert(source, tmp_path / f"out-{kind}", kind)
        error = capsys.readouterr().err
        if codes[kind]:
            assert codes[kind] == 2
            require_line(error, kind)
            assert f"read it with --from {kinds[0]}" in error or kind in ("vqav2", "okvqa"), error
            assert str(source) in error
        elif kind in kinds:
            (sample,) = open_collection(str(tmp_path / f"out-{kind}")).samples
            assert sample.captions == ("a cat",) or {"cat"} <= set(sample.questions[0].answers)
    assert [kind for kind in kinds if codes[kind]] == []


@pytest.mark.parametrize("name", UNKNOWN)
def test_files_of_no_known_form(name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / name).write_bytes(UNKNOWN[name])
    for kind in READERS:
        assert convert(place / name, tmp_path / "out", kind) == 2, kind
        error = capsys.readouterr().err
        require_line(error, kind)
        assert name in error


def test_the_lists_of_lavis_keep_answers_and_weights(place: Path, converted: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": NAME, "question": "what?", "answer": ["cat", "pet"], "weight": [0.7, 0.3], "question_id": 9},
        {"image": NAME, "question": "how many?", "answer": {"1": 1.0, "2": 0.0}},
        {"image": NAME, "question": "who?", "answer": [{"answer": "a cat"}]},
        {"image": NAME, "question": "one?", "answer": 1},
        {"image": NAME, "question": "test?"},
        {"image": None, "question": "of none?"},
        {"image": NAME, "question": "heavy?", "answer": ["a"], "weight": ["b"]},
    ]
    manifest, samples = converted("lavis", dump(place / "vqa_train.json", rows))
    (sample,) = samples.values()
    assert [(q["question"], q["answers"], q.get("question_id")) for q in sample["qa"]] == [
        ("what?", ["cat"] * 7 + ["pet"] * 3, 9),
        ("how many?", ["1"] * 10, None),
        ("who?", ["a cat"], None),
        ("one?", ["1"], None),
        ("test?", [], None),
    ]
    assert manifest["bad"] == {"no image": 1, "weights are not a number for each answer": 1}
    weighted = {"image": NAME, "question": "what?", "answers": {"cat": 0.9, "pet": 0.1}}
    (place / "w.jsonl").write_text(json.dumps(weighted))
    assert open_collection(str(place / "w.jsonl")).samples[0].questions[0].answers == (*["cat"] * 9, "pet")


def test_conversations_become_questions(place: Path, converted: Any) -> None:
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")]
    rows = [
        {"id": "7", "image": NAME, "conversations": [{"from": who, "value": text} for who, text in turns]},
        {"id": "text", "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hello"}]},
        {"id": "odd", "image": NAME, "conversations": ["hello"]},
    ]
    manifest, samples = converted("table", dump(place / "llava.json", rows))
    (sample,) = samples.values()
    assert [(q["question"], q["answers"]) for q in sample["qa"]] == [("What is it?", ["A cat."]), ("Sure?", ["Yes."])]
    assert manifest["bad"] == {"no image": 1, "conversations are not turns with from and value": 1}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_tables_as_excel_writes_them(
    delimiter: str, encoding: str, place: Path, converted: Any, draw_image: Callable[..., Path]
) -> None:
    draw_image(place / "sub" / "é.png", 8)
    text = 'a “café”; with, all | of\tthese " marks'
    with (place / "export.csv").open("w", encoding=encoding, newline="") as handle:
        writer = csv.writer(handle, delimiter=delimiter)
        writer.writerow(["Image", " Caption "])
        writer.writerow([rf"C:\Users\me\{NAME}", text])
        writer.writerow([r"sub\É.PNG", "zwei\nZeilen"])
        writer.writerow(["", ""])
    _, samples = converted("table", place / "export.csv")
    assert [sample["captions"] for sample in samples.values()] == [[text], ["zwei\nZeilen"]]
    assert [sample["member"].rpartition(".")[2] for sample in samples.values()] == ["jpg", "png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"image,caption\n{NAME},a cat, a dog\n", "line 2 has 3 fields and the header 2"),
        (f'image,caption\n{NAME},"a cat\n', "line 2 cannot be read .unexpected end of data."),
        (f"{NAME},a cat\n{NAME},a dog\n", "which column holds the image"),
        ('{"image": "a.jpg", "caption": "a"}\n{"image": "a.jpg"},\n', "line 2 is not valid JSON"),
        ("image,caption\n", "no table: expected"),
    ],
)
def test_tables_that_lack_something(content: str, message: str, place: Path, converted: Any) -> None:
    (place / "t.csv").write_text(content)
    with pytest.raises(DataError, match=f"t.csv: {message}"):
        converted("table", place / "t.csv")


def test_other_tables(place: Path, converted: Any, tmp_path: Path) -> None:
    """Excel's first line, quotes that enclose nothing, texts by image, objects inside one, gzip, no suffix."""
    stem = NAME.removesuffix(".jpg")
    files = {
        "sep.csv": f"sep=;\nimage;caption\n{NAME};a cat\n",
        "quotes.tsv": f'image\tcaption\n{NAME}\ta "cat\n',
        "map.json": json.dumps({NAME: ["a cat", "one cat"]}),
        "objects.json": json.dumps({NAME: {"caption": "a cat", "tags": "cat"}}),
        "inside.json": json.dumps({"info": {"year": 1}, "data": [{"image": NAME, "caption": "a cat"}]}),
        "one.json": json.dumps({"image": NAME, "caption": "a cat"}),
        "stem.csv": f"image;caption\n{stem};a cat\n",
        "odd.json": json.dumps([{"image": NAME, "caption": "a\u2028cat"}]),
    }
    captions = {}
    for name, content in files.items():
        (place / name).write_text(content)
        _, samples = converted("table", place / name, tmp_path / name)
        captions[name] = [sample["captions"] for sample in samples.values()]
    assert captions.pop("map.json") == [["a cat", "one cat"]]
    assert captions.pop("quotes.tsv") == [['a "cat']]
    assert captions.pop("odd.json") == [["a\u2028cat"]]
    assert list(captions.values()) == [[["a cat"]]] * 5
    (place / "packed.jsonl.gz").write_bytes(gzip.compress(json.dumps({"image": NAME, "caption": "a cat"}).encode()))
    for kind in ("table", "jsonl"):
        _, samples = converted(kind, place / "packed.jsonl.gz", tmp_path / f"gz-{kind}")
        assert [sample["captions"] for sample in samples.values()] == [["a cat"]]
    assert open_collection(str(place / "packed.jsonl.gz")).samples[0].captions == ("a cat",)


def test_folders_decide_between_equal_names(tmp_path: Path, draw_image: Callable[..., Path], converted: Any) -> None:
    for n, part in enumerate(("train", "val")):
        draw_image(tmp_path / "images" / part / "1.jpg", n)
    rows = [{"image": f"D:\\data\\{part}\\1.jpg", "caption": part} for part in ("val", "train")]
    source = dump(tmp_path / "list.json", rows)
    converted("lavis", source, tmp_path / "out", images=tmp_path / "images")
    read = {sample.captions: sample.read() for sample in open_collection(str(tmp_path / "out")).samples}
    for part in ("train", "val"):
        assert read[part,] == (tmp_path / "images" / part / "1.jpg").read_bytes()


def test_imagefolder_in_a_folder_and_in_its_splits(place: Path, converted: Any, tmp_path: Path) -> None:
    for part in ("train", "test"):
        (place / part).mkdir()
        shutil.copy(place / NAME, place / part / "a.jpg")
        (place / part / "metadata.csv").write_text(f"file_name,text\na.jpg,a {part} cat\n")
    for part in ("train", "test"):
        _, samples = converted("imagefolder", place, tmp_path / part, split=part)
        assert [sample["captions"] for sample in samples.values()] == [[f"a {part} cat"]]


def test_data_that_training_cannot_read_names_the_converter(place: Path) -> None:
    lines(place / "metadata.jsonl", {"file_name": NAME, "text": "a cat"})
    assert open_collection(str(place / "metadata.jsonl")).samples[0].captions == ("a cat",)
    source = dump(place / "vqa_train.json", QUESTION_LIST)
    with pytest.raises(DataError, match="not a data set.*questions: `blip2 data convert .* OUT --from lavis` makes"):
        open_collection(str(source))
    with pytest.raises(DataError, match="no text.*metadata file: `blip2 data convert .*in OUT --from imagefolder`"):
        open_collection(str(place))
