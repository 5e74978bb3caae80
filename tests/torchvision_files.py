"""Small copies of torchvision's data sets, with the names and formats of the real files."""

from __future__ import annotations

import bz2
import csv
import json
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.io
from PIL import Image
from torchvision import datasets
from torchvision.datasets import imagenet as imagenet_module

Patch = Callable[[Any, str, Any], None]
"""``MonkeyPatch.setattr``: takes away the checksums of real files."""


def pixels(number: int, *shape: int) -> npt.NDArray[np.uint8]:
    """Return random bytes that are a function of ``number``."""
    return np.random.default_rng(number).integers(0, 256, shape, np.uint8)


def image(path: Path, number: int, size: tuple[int, int] = (10, 12)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(number, *size, 3)).save(path)
    return path.name


def images(folder: Path, names: Iterable[str], first: int = 0) -> None:
    for number, name in enumerate(names, first):
        image(folder / name, number)


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def idx(path: Path, values: npt.NDArray[Any]) -> None:
    """Write an array in the format of MNIST's files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"u1": 8, "i4": 12}[values.dtype.str[1:]]
    big = values.astype(values.dtype.newbyteorder(">"))
    path.write_bytes(struct.pack(f">{values.ndim + 1}i", kind * 256 + values.ndim, *values.shape) + big.tobytes())


def mnist(root: Path, patch: Patch, folder: str = "MNIST") -> None:
    for part, count in (("train", 20), ("t10k", 10)):
        idx(root / folder / "raw" / f"{part}-images-idx3-ubyte", pixels(count, count, 28, 28))
        idx(root / folder / "raw" / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))


def emnist(root: Path, patch: Patch) -> None:
    for part, count in (("train", 52), ("test", 26)):
        name = f"emnist-letters-{part}"
        idx(root / "EMNIST/raw" / f"{name}-images-idx3-ubyte", pixels(count, count, 28, 28))
        idx(root / "EMNIST/raw" / f"{name}-labels-idx1-ubyte", (np.arange(count) % 26 + 1).astype(np.uint8))


def qmnist(root: Path, patch: Patch) -> None:
    for part, count in (("train", 20), ("test", 10)):
        labels = np.zeros((count, 8), np.int32)
        labels[:, 0], labels[:, 1:] = np.arange(count) % 10, 77
        idx(root / "QMNIST/raw" / f"qmnist-{part}-images-idx3-ubyte", pixels(count, count, 28, 28))
        idx(root / "QMNIST/raw" / f"qmnist-{part}-labels-idx2-int", labels)


def cifar(root: Path, patch: Patch, kind: Any = datasets.CIFAR10, key: str = "labels", classes: int = 10) -> None:
    folder = root / kind.base_folder
    folder.mkdir()
    for name in ("train_list", "test_list"):
        patch(kind, name, [[file, None] for file, _ in getattr(kind, name)])
        for number, (file, _) in enumerate(getattr(kind, name)):
            entry = {"data": pixels(number, 2 * classes, 3072), key: [*range(classes)] * 2}
            (folder / file).write_bytes(pickle.dumps(entry))
    patch(kind, "meta", {**kind.meta, "md5": None})
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: [f"c{i}" for i in range(classes)]}))


def cifar100(root: Path, patch: Patch) -> None:
    cifar(root, patch, datasets.CIFAR100, "fine_labels", 100)


def svhn(root: Path, patch: Patch) -> None:
    patch(datasets.SVHN, "split_list", {k: [url, file, None] for k, (url, file, _) in datasets.SVHN.split_list.items()})
    for number, part in enumerate(("train", "test", "extra")):
        labels = np.arange(20, dtype=np.uint8)[:, None] % 10 + 1
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": pixels(number, 32, 32, 3, 20), "y": labels})


def stl10(root: Path, patch: Patch) -> None:
    folder = root / "stl10_binary"
    for name in ("train_list", "test_list"):
        patch(datasets.STL10, name, [[file, None] for file, _ in getattr(datasets.STL10, name)])
    text(folder / "class_names.txt", "airplane", "bird", "car")
    for number, part in enumerate(("train", "test", "unlabeled")):
        pixels(number, 6, 3, 96, 96).tofile(folder / f"{part}_X.bin")
        (np.arange(6, dtype=np.uint8) % 3 + 1).tofile(folder / f"{part}_y.bin")


def usps(root: Path, patch: Patch) -> None:
    for number, name in enumerate(("usps.bz2", "usps.t.bz2")):
        values = pixels(number, 20, 256) / 127.5 - 1
        rows = [
            f"{i % 10 + 1} " + " ".join(f"{at}:{value:.6f}" for at, value in enumerate(row, 1))
            for i, row in enumerate(values)
        ]
        (root / name).write_bytes(bz2.compress("\n".join(rows).encode()))


def semeion(root: Path, patch: Patch) -> None:
    patch(datasets.SEMEION, "md5_checksum", None)
    values = np.concatenate([pixels(0, 20, 256) % 2, np.tile(np.eye(10), (2, 1))], axis=1)
    np.savetxt(root / "semeion.data", values, fmt="%.4f")


def fer2013(root: Path, patch: Patch) -> None:
    resources = {key: (file, None) for key, (file, _) in datasets.FER2013._RESOURCES.items()}
    patch(datasets.FER2013, "_RESOURCES", resources)
    (root / "fer2013").mkdir()
    with open(root / "fer2013/fer2013.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["emotion", "pixels", "Usage"])
        for i, usage in enumerate(["Training"] * 14 + ["PublicTest"] * 7 + ["PrivateTest"] * 7):
            rows.writerow([i % 7, " ".join(map(str, pixels(i, 48 * 48))), usage])


def pcam(root: Path, patch: Patch) -> None:
    import h5py

    for number, part in enumerate(("train", "valid", "test")):
        (root / "pcam").mkdir(exist_ok=True)
        stem = root / "pcam" / f"camelyonpatch_level_2_split_{part}"
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = pixels(number, 6, 96, 96, 3)
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = (np.arange(6, dtype=np.uint8) % 2).reshape(-1, 1, 1, 1)


def caltech256(root: Path, patch: Patch) -> None:
    for number, name in enumerate(("ak47", "american-flag"), 1):
        folder = root / "caltech256/256_ObjectCategories" / f"{number:03d}.{name}"
        images(folder, [f"{number:03d}_{i:04d}.jpg" for i in range(1, 13)])


def celeba(root: Path, patch: Patch) -> None:
    patch(datasets.CelebA, "file_list", [(url, None, file) for url, _, file in datasets.CelebA.file_list])
    folder, names = root / "celeba", [f"{i:06d}.jpg" for i in range(1, 13)]
    images(folder / "img_align_celeba", names)
    text(folder / "list_eval_partition.txt", *(f"{name} {i // 6 + i // 9}" for i, name in enumerate(names)))
    text(folder / "identity_CelebA.txt", *(f"{name} {i}" for i, name in enumerate(names)))
    attributes = [f"{name}  {1 - i % 3} {1 if i % 2 else -1}" for i, name in enumerate(names)]
    text(folder / "list_attr_celeba.txt", "12", "Bald Smiling ", *(a.replace(" 0 ", " 1 ") for a in attributes))
    for name in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        text(folder / name, "12", "x y", *(f"{name} 1 2" for name in names))


def country211(root: Path, patch: Patch) -> None:
    for number, part in enumerate(("train", "valid", "test")):
        for country in ("AD", "ZW"):
            images(root / "country211" / part / country, [f"{i}.jpg" for i in range(3)], 10 * number)


def dtd(root: Path, patch: Patch) -> None:
    for number, part in enumerate(("train", "val", "test")):
        names = [f"{name}/{name}_{i:04d}.jpg" for name in ("banded", "zigzagged") for i in (2 * number, 2 * number + 1)]
        images(root / "dtd/dtd/images", names)
        text(root / "dtd/dtd/labels" / f"{part}1.txt", *names)


def eurosat(root: Path, patch: Patch) -> None:
    for name in ("AnnualCrop", "Forest"):
        for i in range(1, 13):
            image(root / "eurosat/2750" / name / f"{name}_{i}.jpg", i, (64, 64))


def fgvc_aircraft(root: Path, patch: Patch) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    text(data / "variants.txt", "707-320", "A300B4")
    text(data / "families.txt", "Boeing 707", "A300")
    text(data / "manufacturers.txt", "Boeing", "Airbus")
    levels = {"variant": ("707-320", "A300B4"), "family": ("Boeing 707", "A300"), "manufacturer": ("Boeing", "Airbus")}
    for level, names in levels.items():
        rows = {part: [f"{100 * n + i:07d} {names[i % 2]}" for i in range(4)] for n, part in enumerate(PARTS)}
        for part, lines in {**rows, "trainval": rows["train"] + rows["val"]}.items():
            text(data / f"images_{level}_{part}.txt", *lines)
            images(data / "images", [f"{line.split()[0]}.jpg" for line in lines])


PARTS = ("train", "val", "test")


def flowers102(root: Path, patch: Patch) -> None:
    folder = root / "flowers-102"
    files = {key: (file, None) for key, (file, _) in datasets.Flowers102._file_dict.items()}
    patch(datasets.Flowers102, "_file_dict", files)
    images(folder / "jpg", [f"image_{i:05d}.jpg" for i in range(1, 13)])
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([1, 102] * 6)})
    ids = {"trnid": [5, 6, 1, 2], "valid": [3, 4, 7, 8], "tstid": [9, 10, 11, 12]}
    scipy.io.savemat(folder / "setid.mat", {key: np.array(value) for key, value in ids.items()})


def food101(root: Path, patch: Patch) -> None:
    for number, part in enumerate(("train", "test")):
        rows = {name: [f"{name}/{100 * number + i}" for i in range(4)] for name in ("waffles", "apple_pie")}
        (root / "food-101/meta").mkdir(parents=True, exist_ok=True)
        (root / "food-101/meta" / f"{part}.json").write_text(json.dumps(rows))
        images(root / "food-101/images", [f"{name}.jpg" for names in rows.values() for name in names])


def gtsrb(root: Path, patch: Patch) -> None:
    folder = root / "gtsrb"
    for label in range(3):
        images(folder / "GTSRB/Training" / f"{label:05d}", [f"00000_{i:05d}.ppm" for i in range(4)])
    images(folder / "GTSRB/Final_Test/Images", [f"{i:05d}.ppm" for i in range(6)])
    rows = [f"{i:05d}.ppm;53;54;6;5;48;49;{i % 3}" for i in range(6)]
    text(folder / "GT-final_test.csv", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *rows)


def tar(path: Path, folder: Path, mode: Any = "w") -> None:
    """Move the content of a folder to a tar file."""
    with tarfile.open(path, mode) as archive:
        for inner in sorted(folder.iterdir()):
            archive.add(inner, inner.name)
    shutil.rmtree(folder)


def imagenet(root: Path, patch: Patch) -> None:
    """Write the three archives, which the class unpacks."""
    archives = {key: (file, None) for key, (file, _) in imagenet_module.ARCHIVE_META.items()}
    patch(imagenet_module, "ARCHIVE_META", archives)
    words = {"n01440764": "tench, Tinca tinca", "n02012849": "crane", "n03126707": "crane"}
    rows = [(number, wnid, text, "", 0) for number, (wnid, text) in enumerate(words.items(), 1)]
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
    data = root / "devkit/ILSVRC2012_devkit_t12/data"
    text(data / "ILSVRC2012_validation_ground_truth.txt", *(str(i % 3 + 1) for i in range(6)))
    scipy.io.savemat(data / "meta.mat", {"synsets": np.array([*rows, (4, "n00001740", "entity", "", 3)], dtype=kinds)})
    tar(root / archives["devkit"][0], root / "devkit", "w:gz")
    for wnid in words:
        images(root / "unpacked" / wnid, [f"{wnid}_{i}.JPEG" for i in range(4)])
        tar(root / "unpacked" / f"{wnid}.tar", root / "unpacked" / wnid)
    tar(root / archives["train"][0], root / "unpacked")
    images(root / "unpacked", [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)])
    tar(root / archives["val"][0], root / "unpacked")


def imagenette(root: Path, patch: Patch) -> None:
    for wnid in ("n01440764", "n03394916"):
        for part in ("train", "val"):
            images(root / "imagenette2-160" / part / wnid, [f"{part}_{wnid}_{i}.JPEG" for i in range(3)])


def inaturalist(root: Path, patch: Patch) -> None:
    species = [
        "Arthropoda_Insecta_Lepidoptera_Nymphalidae_Vanessa_atalanta",
        "Chordata_Aves_Passeriformes_Corvidae_Pica_pica",
    ]
    for version in ("2021_train_mini", "2021_valid"):
        for number, name in enumerate(species):
            images(root / version / f"{number:05d}_Animalia_{name}", [f"{version}{i}.jpg" for i in range(3)])


def omniglot(root: Path, patch: Patch) -> None:
    patch(datasets.Omniglot, "zips_md5", dict.fromkeys(datasets.Omniglot.zips_md5))
    (root / "omniglot-py").mkdir()
    (root / "omniglot-py/images_background.zip").touch()
    for number, character in enumerate(("Latin/character02", "Greek/character01", "Latin/character01")):
        for i in range(1, 9):
            path = root / "omniglot-py/images_background" / character / f"{number:04d}_{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(8 * number + i, 105, 105)).convert("1").save(path)


def oxford_pets(root: Path, patch: Patch) -> None:
    folder, number = root / "oxford-iiit-pet", 0
    for part in ("trainval", "test"):
        rows = []
        for label, (breed, species) in enumerate((("Abyssinian", 1), ("american_bulldog", 2), ("Bengal", 1)), 1):
            for _ in range(4):
                number += 1
                rows.append(f"{breed}_{number} {label} {species} 1")
                image(folder / "images" / f"{breed}_{number}.jpg", number)
        text(folder / "annotations" / f"{part}.txt", *rows)


def places365(root: Path, patch: Patch) -> None:
    patch(datasets.Places365, "_CATEGORIES_META", ("categories_places365.txt", None))
    files = {key: (file, None) for key, (file, _) in datasets.Places365._FILE_LIST_META.items()}
    patch(datasets.Places365, "_FILE_LIST_META", files)
    text(root / "categories_places365.txt", "/a/airfield 0", "/s/stadium/soccer 1")
    rows = [
        f"/{name}/{i:08d}.jpg {label}" for label, name in enumerate(("a/airfield", "s/stadium/soccer")) for i in (1, 2)
    ]
    text(root / "places365_train_standard.txt", *rows)
    text(root / "places365_val.txt", *(f"Places365_val_{i:08d}.jpg {i % 2}" for i in range(4)))
    images(root / "data_256_standard", [row.split()[0][1:] for row in rows])
    images(root / "val_256", [f"Places365_val_{i:08d}.jpg" for i in range(4)])


def rendered_sst2(root: Path, patch: Patch) -> None:
    for part in ("train", "valid", "test"):
        for name in ("negative", "positive"):
            images(root / "rendered-sst2" / part / name, [f"{part}{i}.png" for i in range(3)])


def stanford_cars(root: Path, patch: Patch) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    meta = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": meta})
    kinds = [("bbox_x1", "u1"), ("class", "u1"), ("fname", "O")]
    for part, place in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = np.array([(1, i % 2 + 1, f"{i:05d}.jpg") for i in range(1, 7)], dtype=kinds)
        scipy.io.savemat(folder / place, {"annotations": rows})
        images(folder / f"cars_{part}", [f"{i:05d}.jpg" for i in range(1, 7)])


def sun397(root: Path, patch: Patch) -> None:
    text(root / "SUN397/ClassName.txt", "/a/abbey", "/s/stadium/soccer")
    for name in ("a/abbey", "s/stadium/soccer"):
        images(root / "SUN397" / name, [f"sun_{name[0]}{i:015d}.jpg" for i in range(12)])


def clevr(root: Path, patch: Patch) -> None:
    folder = root / "clevr/CLEVR_v1.0"
    for part in ("train", "val"):
        names = [f"CLEVR_{part}_{i:06d}.png" for i in range(6)]
        images(folder / "images" / part, names)
        scenes = [{"image_filename": name, "objects": [{}] * (3 + i % 2)} for i, name in enumerate(names)]
        (folder / "scenes").mkdir(exist_ok=True)
        (folder / "scenes" / f"CLEVR_{part}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def fashion_mnist(root: Path, patch: Patch) -> None:
    mnist(root, patch, "FashionMNIST")


def kmnist(root: Path, patch: Patch) -> None:
    mnist(root, patch, "KMNIST")


WRITERS: dict[str, Callable[[Path, Patch], None]] = {
    "CIFAR10": cifar,
    "CIFAR100": cifar100,
    "CLEVRClassification": clevr,
    "Caltech256": caltech256,
    "CelebA": celeba,
    "Country211": country211,
    "DTD": dtd,
    "EMNIST": emnist,
    "EuroSAT": eurosat,
    "FER2013": fer2013,
    "FGVCAircraft": fgvc_aircraft,
    "FashionMNIST": fashion_mnist,
    "Flowers102": flowers102,
    "Food101": food101,
    "GTSRB": gtsrb,
    "INaturalist": inaturalist,
    "ImageNet": imagenet,
    "Imagenette": imagenette,
    "KMNIST": kmnist,
    "MNIST": mnist,
    "Omniglot": omniglot,
    "OxfordIIITPet": oxford_pets,
    "PCAM": pcam,
    "Places365": places365,
    "QMNIST": qmnist,
    "RenderedSST2": rendered_sst2,
    "SEMEION": semeion,
    "STL10": stl10,
    "SUN397": sun397,
    "SVHN": svhn,
    "StanfordCars": stanford_cars,
    "USPS": usps,
}
"""Functions of the data folder, by the name of the class in torchvision.datasets."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "EMNIST": {"split": "letters"},
    "INaturalist": {"version": "2021_train_mini"},
    "Imagenette": {"size": "160px"},
    "Places365": {"small": True},
}
"""Arguments with which the small copies are opened."""
