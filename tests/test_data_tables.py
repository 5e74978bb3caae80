"""Tables of labeled images: formats, columns, labels, and messages that name every faulty row."""

from __future__ import annotations

import builtins
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from pydantic import ValidationError

from toolkit.cache.store import cache_root, list_entries
from toolkit.data.datasets import Dataset, open_dataset
from toolkit.data.image_sources import EncodedImages, check_images
from toolkit.errors import UserError
from toolkit.recipe.schema import DataConfig

PATHS = ["a.png", "b.png", "c.png"]


def png(value: int) -> bytes:
    """Return a PNG file of 4 x 4 gray pixels."""
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(out, "png")
    return out.getvalue()


def opened(path: Path, **settings: Any) -> Dataset:
    return open_dataset(DataConfig.model_validate({"dataset": "table", "table": str(path), **settings}))


def written(folder: Path, text: str, name: str = "labels.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def error_of(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, **settings)
    return str(caught.value).replace(str(path), path.name)


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "image,label\na.png,cat\nb.png,dog\n\nc.png,cat\n"),
        ("byte-order-mark.csv", "\ufeffimage,label\r\na.png,cat\r\nb.png,dog\r\nc.png,cat\r\n"),
        ("quoted.csv", '"label", image\n"cat",a.png\n"dog",b.png\n"cat",c.png'),
        ("semicolons.csv", "image;label\na.png;cat\nb.png;dog\nc.png;cat\n"),
        ("labels.tsv", "file_name\tlabel\na.png\tcat\nb.png\t dog \nc.png\tcat\n"),
        ("labels.jsonl", '{"path": "a.png", "label": "cat"}\n{"label": "dog", "path": "b.png"}\n'
         '{"path": "c.png", "label": "cat", "more": 1}\n'),
    ],
)  # fmt: skip
def test_text_formats_are_read(name: str, text: str, tmp_path: Path) -> None:
    data = opened(written(tmp_path, text, name))
    assert data.classes == ["cat", "dog"]
    assert data.labels.tolist() == [0, 1, 0]
    assert [data.images.name(i) for i in range(3)] == PATHS


def test_names_of_classes_that_the_library_datasets_writes_are_used(tmp_path: Path) -> None:
    path, feature = tmp_path / "images.parquet", {"names": ["1", "0"], "_type": "ClassLabel"}
    for column, kind in ((feature, [0, 1]), ({"feature": feature, "_type": "List"}, [[0], [1]])):
        features = {"huggingface": json.dumps({"info": {"features": {"label": column}}})}
        table = pa.table({"image": [png(1), png(2)], "label": kind}).replace_schema_metadata(features)
        parquet.write_table(table, path)
        assert opened(path).classes == ["1", "0"]
        assert opened(path).labels.tolist() == ([0, 1] if column is feature else [[1, 0], [0, 1]])
        assert opened(path, class_names=["a", "b"]).classes == ["a", "b"]
    table = pa.table({"image": [png(1), png(2)], "label": [0, -1]}).replace_schema_metadata(features)
    parquet.write_table(table, path)
    message = "row 2: the label '-1' is not in the class names in the table, whose indices are 0 to 1"
    assert message in error_of(path)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_images_in_a_parquet_file_are_copied_once_and_read_one_by_one(compression: str, tmp_path: Path) -> None:
    path, contents = tmp_path / "images.parquet", [png(i) for i in range(200)]
    labels = [i % 3 for i in range(200)]
    parquet.write_table(pa.table({"image": contents, "label": labels}), path, compression=compression)
    for _ in range(2):
        images = opened(path).images
        assert isinstance(images, EncodedImages)
        assert [int(images.load(i).max()) for i in (199, 0, 7)] == [199, 0, 7]
        assert images.name(7) == "images.parquet/8"
        assert images.source.size_and_version(7)[0] == len(contents[7])
        assert len({images.source.size_and_version(i)[1] for i in range(200)}) == 200
    (entry,) = list_entries(cache_root())
    assert (entry.kind, entry.data, entry.images) == ("encoded", "images.parquet", 200)


def test_a_parquet_file_may_name_files_and_a_changed_one_is_copied_again(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    for name in PATHS[:2]:
        (tmp_path / name).write_bytes(png(7))
    parquet.write_table(
        pa.table({"image": [{"bytes": None, "path": name} for name in PATHS[:2]], "label": [1.0, 2.0]},
                 pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", "f8")])),
        path,
    )  # fmt: skip
    data = opened(path)
    assert data.classes == ["1", "2"]
    assert int(data.images.load(1).max()) == 7
    parquet.write_table(pa.table({"image": [{"bytes": png(9), "path": "x"}] * 2, "label": [1, 2]}), path)
    assert [opened(path).images.name(i) for i in range(2)] == ["images.parquet/1", "images.parquet/2"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    listed = pa.array([{"bytes": None, "path": "a.png"}] * 2, kind)
    parquet.write_table(pa.table({"image": listed, "label": [1, 2]}), path)
    assert "row 2: a.png is also in row 1" in error_of(path)
    parquet.write_table(pa.table({"image": [png(9), png(8)], "label": [1, 2]}), path)
    assert int(opened(path).images.load(1).max()) == 8


def test_an_image_that_cannot_be_decoded_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    parquet.write_table(pa.table({"image": [png(1), b"", b"not an image", png(2)[:40]], "label": [0, 1, 0, 1]}), path)
    images = opened(path).images
    bad = check_images(images, np.arange(4), decode=True).bad
    assert [i for i, _ in bad] == [1, 2, 3]
    assert [reason for _, reason in bad][:2] == [
        "an empty file (row 2 of images.parquet)",
        "not an image of a known format (row 3 of images.parquet)",
    ]


def test_a_missing_file_is_named_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(png(1))
    images = opened(written(tmp_path, "image,label\na.png,cat\nb.png,dog\n")).images
    assert check_images(images, np.arange(2), decode=False).bad == [(0, "no such file (row 2 of labels.csv)")]


def test_paths_are_relative_to_the_table_or_to_the_root(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_bytes(png(3))
    (tmp_path / "elsewhere" / "b.png").write_bytes(png(4))
    table = written(tmp_path, f"image,label\nelsewhere/a.png,x\n{tmp_path}/elsewhere/b.png,y\n")
    assert [int(opened(table).images.load(i).max()) for i in (0, 1)] == [3, 4]
    table = written(tmp_path, "image,label\na.png,x\nb.png,y\n")
    assert int(opened(table, root=str(tmp_path / "elsewhere")).images.load(0).max()) == 3


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "classes", "expected"),
    [
        ("10 9 10", None, ["9", "10"], [1, 0, 1]),
        ("b A b", None, ["A", "b"], [1, 0, 1]),
        ("cat dog cat", ["dog", "cat", "owl"], ["dog", "cat", "owl"], [1, 0, 1]),
        ("1 0 2", ["dog", "cat", "owl"], ["dog", "cat", "owl"], [1, 0, 2]),
        ("7 5 7", ["7", "5"], ["7", "5"], [0, 1, 0]),
    ],
)
def test_labels_are_names_or_indices(
    labels: str, names: list[str] | None, classes: list[str], expected: list[int], tmp_path: Path
) -> None:
    rows = "".join(f"{path},{label}\n" for path, label in zip(PATHS, labels.split(), strict=True))
    table = written(tmp_path, "image,label\n" + rows)
    (tmp_path / "names.txt").write_text("\n".join(names or []) + "\n")
    for given in [names] if names is None else [names, str(tmp_path / "names.txt")]:
        data = opened(table, class_names=given)
        assert (data.classes, data.labels.tolist()) == (classes, expected)


def test_several_labels_are_a_list_text_with_a_separator_or_columns(tmp_path: Path) -> None:
    expected = [[1, 1, 0], [0, 0, 0], [0, 1, 1]]
    lists = [["cat", "dog"], [], ["owl", "dog"]]
    lines = "\n".join(json.dumps({"image": path, "label": label}) for path, label in zip(PATHS, lists, strict=True))
    parquet.write_table(pa.table({"image": PATHS, "label": lists}), tmp_path / "l.parquet")
    separated = "".join(f"{path},{'|'.join(label)}\n" for path, label in zip(PATHS, lists, strict=True))
    columns = "image,cat,dog,owl\na.png,1,1,0\nb.png,0,0,0\nc.png,0,1,1\n"
    for path, settings in (
        (written(tmp_path, lines, "l.jsonl"), {}),
        (tmp_path / "l.parquet", {}),
        (written(tmp_path, f"image,label\n{separated}", "s.csv"), {"label_separator": "|"}),
        (written(tmp_path, columns, "c.csv"), {"columns": {"label": ["cat", "dog", "owl"]}}),
    ):
        data = opened(path, **settings)
        assert data.is_multi_label
        assert data.classes == ["cat", "dog", "owl"]
        assert data.labels.dtype == np.uint8
        assert data.labels.tolist() == expected


def test_columns_of_labels_may_hold_truth_values_and_floats_as_pandas_writes_them(tmp_path: Path) -> None:
    table = written(tmp_path, "image,cat,dog\na.png,True,0.0\nb.png,False,1.0\nc.png,1, 1\n")
    assert opened(table, columns={"label": ["cat", "dog"]}).labels.tolist() == [[1, 0], [0, 1], [1, 1]]


def test_splits_groups_and_weights_are_read(tmp_path: Path) -> None:
    table = written(tmp_path, "image,label,s,g,w\na.png,x,Train,p1,1\nb.png,y,val,p2,0.5\nc.png,y,TRAINING,p1,0\n")
    data = opened(table, columns={"split": "s", "group": "g", "weight": "w"})
    assert {split: indices.tolist() for split, indices in data.lists.items()} == {"train": [0, 2], "validation": [1]}
    assert data.groups is not None
    assert data.groups.tolist() == [0, 1, 0]
    table = written(tmp_path, "image,label,s,g\na.png,x,train,p1\nb.png,y,val,p1\nc.png,y,train,p2\n")
    notes = opened(table, columns={"split": "s", "group": "g"}).notes
    assert notes[1] == "1 group of the table in both train and validation"
    assert data.weights is not None
    assert data.weights.tolist() == [1, 0.5, 0]
    note = opened(written(tmp_path, "image,label,split\na.png,x,train\nb.png,y,train\n")).notes[1]
    assert note == "column 'split' is not used; to take the splits from it, set data.columns.split = 'split'"


def test_other_columns_are_kept_as_text(tmp_path: Path) -> None:
    values = {"image": PATHS, "label": [0, 1, 1], "age": [4, -2.5, None], "site": ["a b", "c\nd", "=1"], "g": [7, 7, 8]}
    parquet.write_table(pa.table(values), tmp_path / "labels.parquet")
    lines = [json.dumps({name: column[i] for name, column in values.items()}) for i in range(3)]
    kept = {"keep": ["age", "site", "g"], "group": "g"}
    for table in (tmp_path / "labels.parquet", written(tmp_path, "\n".join(lines), "labels.jsonl")):
        data = opened(table, columns=kept)
        found = {name: [column[i] for i in range(3)] for name, column in data.kept.items()}
        assert [float(text or "nan") for text in found.pop("age")] == pytest.approx(
            [4, -2.5, float("nan")], nan_ok=True
        )
        assert found == {"site": ["a b", "c%0Ad", "%3D1"], "g": ["7", "7", "8"]}
        assert data.groups is not None
        assert data.groups.tolist() == [0, 0, 1]
        assert "keep from column 'age, site, g'" in data.notes[0]
    assert "labels.jsonl has no column 'sites'" in error_of(table, columns={"keep": ["sites"]})


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["prediction"], "predictions.csv has its own column 'prediction': rename the one in the table"),
        (["probability of rain"], "predictions.csv has its own column 'probability of rain'"),
        (["site", "site"], "the column 'site' is listed twice"),
    ],
)
def test_columns_that_cannot_be_kept_are_named(keep: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        opened(tmp_path / "labels.csv", columns={"keep": keep})


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("a.png,cat\n,dog\nb.png,\nc.png\na.png,dog\n", {},
         "3 rows of labels.csv cannot be used: row 3: no image path; row 4: no label; "
         "row 5: 1 field, but the header has 2. Correct or remove them"),
        ("a.png,cat\nb.png,dog\na.png,dog\n", {}, "row 4: a.png is also in row 2"),
        ("a.png,cat\nb.png,mouse\nc.png,2\n", {"class_names": ["cat", "dog"]},
         "row 3: the label 'mouse' is not in data.class_names; row 4: the label '2' is not in data.class_names, "),
        ("a.png,cat\nb.png,dog\n", {"columns": {"label": "lable"}},
         "labels.csv has no column 'lable', only image, label; data.columns.label sets the "
         "column to read: did you mean label?"),
        ("a.png,cat\nb.png,tset\n", {"columns": {"split": "label"}}, "row 2: unknown split 'cat'"),
        ("a.png,cat\nb.png,dog\n", {"columns": {"split": "label", "label": "image"}}, "2 rows of labels.csv"),
        ("a.png,test\nb.png,val\n", {"columns": {"split": "label"}},
         "has no training images: no row has the split train"),
        ("a.png,-1\n", {"columns": {"weight": "label"}}, "row 2: the weight '-1' is not a finite number of at least 0"),
        ("a.png,1\nb.png,2\n", {"columns": {"label": ["label", "image"]}}, "row 3: label is '2' instead of 0 or 1"),
        ("a.png,cat\nb.png,cat\n", {}, "has only the class 'cat'; a classifier needs two or more"),
        ("a.png,\nb.png,\n", {"label_separator": ";"}, "labels.csv has no label in any row; a classifier needs two"),
        ("a.png,1\nb.png,2\n", {"class_names": ["cat", "dog"]},
         "row 3: the label '2' is not in data.class_names, whose indices are 0 to 1"),
        ("./a.png,cat\na.png,dog\nb//c.png,cat\nb/c.png,dog\n", {},
         "row 3: a.png is also in row 2; row 5: b/c.png is also in row 4"),
        (f"a.png,{'9' * 5000}\n", {}, f"has only the class '{'9' * 5000}'"),
        ("", {}, "labels.csv has no rows below the column names"),
    ],
)  # fmt: skip
def test_faulty_tables_are_refused(text: str, settings: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in error_of(written(tmp_path, "image,label\n" + text), **settings)


def test_classes_that_differ_in_their_unicode_form_only_are_noted(tmp_path: Path) -> None:
    table = written(tmp_path, "image,label\na.png,caf\u00e9\nb.png,cafe\u0301\n")
    (note,) = (note for note in opened(table).notes if note.startswith("warning"))
    assert "two classes whose names look the same" in note
    assert r"'cafe\u0301' and 'caf\xe9'; if they are one class, write both in the same form, such as NFC" in note


def test_a_path_and_its_absolute_form_are_the_same_image(tmp_path: Path) -> None:
    table = written(tmp_path, f"image,label\na.png,cat\n{tmp_path}/a.png,dog\n")
    assert error_of(table) == f"1 row of labels.csv cannot be used: row 3: {tmp_path}/a.png is also in row 2. " + (
        "Correct or remove them"
    )


def test_many_faulty_rows_are_counted(tmp_path: Path) -> None:
    message = error_of(written(tmp_path, "image,label\n" + "".join(f"{i}.png,\n" for i in range(1000))))
    assert message.startswith("1,000 rows of labels.csv cannot be used: row 2: no label; row 3")
    assert "row 11: no label; and 990 more" in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("labels.xlsx", b"", "the format is unknown; the name must end in .csv, .tsv, .jsonl, .ndjson, .parquet"),
        ("labels.csv", None, "is not a file; paths are relative to the working directory"),
        ("labels.csv", b"", "labels.csv is empty"),
        ("labels.csv", b"image,label,image\n", "has more than one column 'image'"),
        ("labels.csv", "image,label\n".encode("utf-16"), "labels.csv is text in UTF-16; save it as UTF-8"),
        ("labels.csv", b"image,label\na," + b"x" * 200_000, "labels.csv, line 2: field larger than field limit"),
        ("labels.csv", b"image,label\na\0,x\n", "row 2: a null character in the image path"),
        ("labels.jsonl", b"[1, 2]\n", "the first line of labels.jsonl is not a JSON object"),
        ("labels.jsonl", b'{"image": "a", "label": 1}\n{"image": "b"}\n{"im', "row 2: no 'label'; row 3: not JSON"),
        ("labels.parquet", b"PAR1", "labels.parquet is not a Parquet file, or is damaged"),
    ],
)
def test_files_that_are_no_tables_are_refused(name: str, content: bytes | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert expected in error_of(tmp_path / name)


@pytest.mark.parametrize(("label", "multi"), [(b"dog", False), (b"n\xe9", False), (b"n\xe9;dog", True)])
def test_a_table_in_latin_1_is_read_and_noted(label: bytes, multi: bool, tmp_path: Path) -> None:
    content = "image,label\n\u00e9\u4e2d.png,cat\n".encode() + b"n\xe9.png," + label + b"\nb.png," + label + b"\n"
    (tmp_path / "labels.csv").write_bytes(content)
    data = opened(tmp_path / "labels.csv", label_separator=";" if multi else None)
    assert data.images.name(1) == "n%E9.png"
    (note,) = (note for note in data.notes if "UTF-8" in note)
    found = "row 3" if label == b"dog" else "row 3 and 1 other row"
    assert note == (
        f"{found} of {tmp_path}/labels.csv are not UTF-8, which is how tables are read; if the file is in another "
        "encoding, such as Latin-1 or Windows-1252, save it as UTF-8"
    )


def test_rows_without_an_image_are_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": [png(1), None, png(2)], "label": [0, 1, 1]}), tmp_path / "i.parquet")
    assert "1 row of i.parquet cannot be used: row 2: no image in column 'image'" in error_of(tmp_path / "i.parquet")


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i.parquet"
    parquet.write_table(pa.table({"image": [png(i) for i in range(100)], "label": list(range(100))}), path)
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(200) + content[400:])  # the description at the end is whole
    assert "i.parquet is not a Parquet file, or is damaged" in error_of(path)
    assert list_entries(cache_root()) == []


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "i.parquet").touch()
    original = builtins.__import__

    def without_pyarrow(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert "needs pyarrow, which is not installed: pip install 'image-classification-toolkit[parquet]'" in error_of(
        tmp_path / "i.parquet"
    )
