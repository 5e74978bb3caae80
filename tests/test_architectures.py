"""Every listed architecture can be used: a sample is trained on the CPU, and all are built without memory (slow)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from accelerate import init_empty_weights
from architectures import CLASSES, check_explained, check_export, check_step, check_structure, trained
from timm.models import get_pretrained_cfg

from toolkit.errors import UserError
from toolkit.inference.export import FORMATS
from toolkit.models.build import ModelBundle, build_model
from toolkit.recipe import catalog
from toolkit.recipe.schema import ModelConfig

pytestmark = pytest.mark.long

FAMILIES = """
byoanet: halonet_h1 256, eca_botnext26ts_256 64
byobnet: test_byobnet 64, mobileone_s1 64
cait: cait_xxs24_224 64
coat: coat_tiny 64, coat_lite_tiny 64
convit: convit_tiny 64
convmixer: convmixer_768_32 64
convnext: test_convnext 64, test_convnext3 64
cpubone: cpubone_nano 64, cpubone_t0 64
crossvit: crossvit_tiny_240 240, crossvit_9_240 240
csatv2: csatv2 64
cspnet: cs3darknet_focus_s 64, cs3darknet_s 64
cspnext: cspnext_tiny 64, cspnext_s 64
davit: davit_tiny 64
deit: deit_tiny_patch16_224 64, deit_tiny_distilled_patch16_224 64
densenet: densenet121 64, densenetblur121d 64
dla: dla46x_c 64, dla46_c 64
dpn: dpn48b 64
edgenext: edgenext_xx_small 64, edgenext_x_small 64
efficientformer: efficientformer_l1 224
efficientformer_v2: efficientformerv2_s0 64, efficientformerv2_s1 64
efficientnet: test_efficientnet 64, test_efficientnet_gn 64
efficientvim: efficientvim_m1 64, efficientvim_m1_dist 64
efficientvit_mit: efficientvit_b0 64, efficientvit_b1 64
efficientvit_msra: efficientvit_m0 64, efficientvit_m1 64
eva: vit_tiny_patch16_dinov3_qkvb 64, eva02_tiny_patch14_224 64, vit_small_patch16_rope_mixed_224 64
fasternet: fasternet_t0 64, fasternet_t1 64
fastvit: fastvit_t8 64, fastvit_t12 64
focalnet: focalnet_tiny_srf 64
gcvit: gcvit_xxtiny 64
ghostnet: ghostnet_050 64, ghostnetv3_050 64
hardcorenas: hardcorenas_b 64, hardcorenas_a 64
hgnet: hgnetv2_b0 64, hgnetv2_b1 64
hiera: hiera_tiny_224 64
hieradet_sam2: sam2_hiera_tiny 64
hrnet: hrnet_w18_small 64
iformer: iformer_t 64, iformer_s 64
inception_next: inception_next_atto 64
inception_v3: inception_v3 299
lcnetv2: lcnetv2_small 64, lcnetv2_base 64
levit: levit_128s 64, levit_conv_128s 64
lowformer: lowformer_b0 64
mambaout: test_mambaout 64, mambaout_femto 64
maxxvit: test_coatnet 64, test_maxvit 64
metaformer: caformer_s18 64, poolformerv2_s12 64
mlp_mixer: gmlp_ti16_224 64
mobilenetv3: lcnet_035 64, mobilenetv3_small_050 64
mobilevit: mobilevit_xxs 64, mobilevitv2_050 64
mvitv2: mvitv2_tiny 64
nest: nest_tiny 64
nfnet: test_nfnet 64, nf_regnet_b0 64
pit: pit_ti_224 64, pit_ti_distilled_224 64
pvt_v2: pvt_v2_b0 64
rdnet: rdnet_tiny 64
regnet: regnetx_002 64, regnety_002 64
repghost: repghostnet_050 64, repghostnet_058 64
repvit: repvit_m1 64, repvit_m0_9 64
res2net: res2next50 64
resnest: resnest14d 64
resnet: test_resnet 64, resnet10t 64
resnetv2: resnetv2_18 64
rexnet: rexnet_100 64, rexnetr_100 64
selecsls: selecsls42 64
senet: legacy_seresnet18 64
sequencer: sequencer2d_s 64
shvit: shvit_s1 64
sknet: skresnet18 64
starnet: starnet_s050 64, starnet_s100 64
swiftformer: swiftformer_xs 64, swiftformer_s 64
swin_transformer: swin_tiny_patch4_window7_224 64
tiny_vit: tiny_vit_5m_224 64
tnt: tnt_s_legacy_patch16_224 64
tresnet: tresnet_m 64
twins: twins_svt_small 64
visformer: visformer_tiny 64
vision_transformer: test_vit 64, test_vit2 64
vision_transformer_relpos: test_vit_relpos 64, vit_srelpos_small_patch16_224 224
volo: volo_d1_224 64
vovnet: ese_vovnet19b_slim_dw 64, ese_vovnet19b_slim 64
xception: legacy_xception 64
xception_aligned: xception41p 64
xcit: xcit_nano_12_p8_224 64, xcit_nano_12_p8_384 64
torchvision: mobilenet_v3_small 64, mobilenet_v2 64, shufflenet_v2_x0_5 64, squeezenet1_1 64, mnasnet0_5 64,
  regnet_y_400mf 64, resnet18 64, efficientnet_b0 64, densenet121 64, googlenet 96, swin_t 64
"""
"""Small architectures and the image size at which they are tested, as ``family: name size, ...``: every family of timm
with an architecture of less than 30 million parameters, and torchvision."""

RISKY = (
    "cait_xxs24_224",
    "caformer_s18",
    "coat_lite_tiny",
    "crossvit_tiny_240",
    "deit_tiny_distilled_patch16_224",
    "efficientvim_m1_dist",
    "hrnet_w18_small",
    "levit_128s",
    "pit_ti_distilled_224",
    "test_vit_relpos",
    "twins_svt_small",
    "vit_small_patch16_rope_mixed_224",
    "volo_d1_224",
    "xcit_nano_12_p8_224",
)
"""Several heads, shared layers, position tables, or alternating lists of layers: always in the sample."""
SLOW = (
    "convmixer_768_32",
    "coat_tiny",
    "davit_tiny",
    "focalnet_tiny_srf",
    "ghostnetv3_050",
    "halonet_h1",
    "hiera_tiny_224",
    "inception_v3",
    "legacy_xception",
    "mvitv2_tiny",
    "rdnet_tiny",
    "repghostnet_050",
    "repghostnet_058",
    "res2next50",
    "sam2_hiera_tiny",
    "selecsls42",
    "sequencer2d_s",
    "swin_t",
    "swin_tiny_patch4_window7_224",
    "tnt_s_legacy_patch16_224",
    "tresnet_m",
    "xception41p",
)
"""More than 20 million parameters, or slow to build: in the sample only if they are in RISKY."""
SAMPLE = 18
DEFAULT = 4
"""Number of them that the default lane has."""
"""Number of sampled architectures; the slow tests cover all small ones."""


def small() -> list[tuple[str, str, int]]:
    """Return source, name and image size of all architectures in FAMILIES."""
    found = []
    for line in FAMILIES.strip().replace("\n  ", " ").splitlines():
        family, _, entries = line.partition(": ")
        for entry in entries.split(", "):
            name, size = entry.split()
            found.append(("torchvision" if family == "torchvision" else "timm", name, int(size)))
    return found


def chosen() -> list[tuple[str, str, int]]:
    """Return the risky architectures, and others drawn with a fixed seed."""
    risky = [entry for entry in small() if entry[1] in RISKY and entry[0] == "timm"]
    assert len(risky) == len(RISKY)
    rest = [entry for entry in small() if entry[1] not in (*RISKY, *SLOW) and entry[2] <= 96]
    return [*risky, *random.Random(0).sample(rest, SAMPLE - len(risky))]


SMALL = small()


def table_of(source: str, name: str) -> ModelConfig:
    return ModelConfig.model_validate({"source": source, "name": name})


@pytest.mark.parametrize(
    ("source", "name", "size"),
    [pytest.param(*entry, marks=pytest.mark.extended if at >= DEFAULT else ()) for at, entry in enumerate(chosen())],
)
def test_sampled_architectures_can_be_trained_explained_and_exported(
    source: str, name: str, size: int, tmp_path: Path
) -> None:
    """Check one training step, the layer groups and their order, heads, Grad-CAM's layer, and export."""
    torch.manual_seed(0)
    table = table_of(source, name)
    built = build_model(table, len(CLASSES), 3, size)
    check_structure(built, size)
    check_step(built, size)
    model = trained(built, table, size)
    check_explained(model, built)
    check_export(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name", "size"), SMALL)
def test_all_small_architectures_can_be_trained_explained_and_exported(
    source: str, name: str, size: int, tmp_path: Path
) -> None:
    """Check the same as for the sample, and that torch.export's program computes the same outputs."""
    test_sampled_architectures_can_be_trained_explained_and_exported(source, name, size, tmp_path)
    table = table_of(source, name)
    model = trained(build_model(table, len(CLASSES), 3, size), table, size)
    program = FORMATS["torch-export"]
    program.write(model, tmp_path)
    images = torch.randn(3, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(program.read(tmp_path)(images), model.module(images), rtol=1e-3, atol=1e-4)


def build_without_memory(table: ModelConfig, size: int) -> ModelBundle:
    """Build on the meta device; if a constructor computes with its tensors, only its parameters are on that device."""
    try:
        with torch.device("meta"):
            return build_model(table, len(CLASSES), 3, size)
    except UserError:
        with init_empty_weights(include_buffers=False):
            return build_model(table, len(CLASSES), 3, size)


def native_size(source: str, name: str) -> int:
    if source == "timm":
        config: Any = get_pretrained_cfg(name)
        return int(config.input_size[-1])
    return 518 if name == "vit_h_14" else 224


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("source", ["torchvision", "timm"])
@pytest.mark.parametrize("part", range(8))
def test_every_listed_architecture_can_be_built(source: str, part: int) -> None:
    """Check heads, layer groups and optimizer groups, without memory for the parameters."""
    faults = []
    for name in catalog.model_names(source)[part::8]:
        try:
            check_structure(build_without_memory(table_of(source, name), size := native_size(source, name)), size)
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


def test_every_architecture_of_the_libraries_is_listed_or_excluded_with_a_reason() -> None:
    excluded = catalog.excluded_models()
    assert {*catalog.model_names("timm"), *excluded} == set(timm.list_models())
    assert not set(catalog.model_names("timm")) & set(excluded)
    assert catalog.model_names("torchvision") == sorted(torchvision.models.list_models(module=torchvision.models))
    assert all(excluded.values())


def test_architectures_that_are_not_listed_have_no_classifier() -> None:
    for name in catalog.excluded_models():
        with torch.device("meta"), pytest.raises(UserError, match=f"timm's {name} has no classifier"):
            build_model(ModelConfig(source="timm", name=name), len(CLASSES), 3, 224)
