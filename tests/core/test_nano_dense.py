"""Dense targets that the nano recipes need: offsets in the picture, weights per object, latents in charge of cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlm4vla_core.cli import main
from vlm4vla_core.dense_heads import dense_losses
from vlm4vla_core.dense_objective import DenseTargets, _cells
from vlm4vla_core.episodes.store import EpisodeStore
from vlm4vla_core.errors import InputError
from vlm4vla_core.folders import read_json
from vlm4vla_core.nano import nano
from vlm4vla_core.sims.tabletop.looks import LOOKS
from vlm4vla_core.sims.tabletop.world import COLOURS


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "store"
    assert main(["record", "tabletop", "--tasks", "scene", "--episodes", "24", "--out", str(out)]) == 0
    return EpisodeStore.open(out)


def test_offsets_against_projecting_every_object_by_itself(scenes):
    source = DenseTargets(scenes, "front", nano("paligemma", "s").geometry)
    values, mask = source.get("offset", np.arange(24), {})
    values = values.reshape(24, 64, 2, len(COLOURS), 2)  # (picture, cell, object or plate, colour, axis)
    seen = 0
    for row in range(24):
        look = LOOKS[scenes.episodes["domain"][row]]
        places = scenes.column("truth/objects")[row].reshape(-1, 3)
        for slot, name in enumerate(scenes.episodes["objects"][row].split(";")):
            (x, y), _ = look.camera.project(places[slot])
            column, line = int(x * 8), int(y * 8)
            found = values[row, line * 8 + column, 0, COLOURS.index(name.split()[0])]
            np.testing.assert_allclose(found, (x * 8 - column - 0.5, y * 8 - line - 0.5), atol=1e-5)
            assert mask[row, line * 8 + column]
            seen += 1
        plates = scenes.column("truth/plates")[row].reshape(-1, 2)
        for slot, name in enumerate(scenes.episodes["plates"][row].split(";")):
            (x, y), _ = look.camera.project(np.array([*plates[slot], 0.0]))
            found = values[row, int(y * 8) * 8 + int(x * 8), 1, COLOURS.index(name.split()[0])]
            np.testing.assert_allclose(found, (x * 8 % 1 - 0.5, y * 8 % 1 - 0.5), atol=1e-5)
            seen += 1
    assert np.isfinite(values).sum() == 2 * seen  # and nothing else


def test_presence_counts_per_object_and_offset_only_where_it_is_known():
    target = torch.zeros(2, 4, 3)
    target[0, 1, 2] = target[0, 3, 0] = 1
    logits = torch.zeros(2, 4, 3)
    offset = torch.full((2, 4, 2), torch.nan)
    offset[0, 1] = torch.tensor([0.5, 0.02])
    known = torch.zeros(2, 4, dtype=torch.bool)
    known[0, 1] = True
    batch = {"dense_presence": target, "dense_presence_mask": torch.ones(2, 4, dtype=torch.bool)}
    batch |= {"dense_offset": offset, "dense_offset_mask": known}
    found = dense_losses({"presence": logits, "offset": torch.zeros(2, 4, 2)}, batch)
    # log 2 for each of 12 logits: over two objects in the first picture, over one (none is there) in the second
    assert float(found["presence"]) == pytest.approx((12 * np.log(2) / 2 + 12 * np.log(2)) / 2)
    # beyond beta |d| - beta / 2, within it d^2 / (2 beta); a picture without any counts as 0
    assert float(found["offset"]) == pytest.approx((0.5 - 0.05 + 0.02**2 / 0.2) / 2)


def test_latents_take_cells_of_a_square_grid():
    assert _cells(nano("kosmos2", "xs")).tokens == 16 and _cells(nano("kosmos2", "s")).tokens == 64
    other = nano("kosmos2", "s")
    other.geometry = type(other.geometry)(14, 1, 1, 0, 112, placeholders=8, exact=False)
    with pytest.raises(InputError, match="8 image tokens"):
        _cells(other)


@pytest.mark.parametrize("family", ["kosmos2", "qwen2_5_vl"])
def test_the_stages_of_a_recipe_run_one_after_the_other(family, scenes, tmp_path):
    """A recipe in miniature: three stages in one file, vision frozen to the bit while language is taught."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'preset = "nano/pretrain"\nfamily = "{family}"\nsize = "xs"\nmax_steps = 2\nbatch_size = 4\nval_rows = 2\n'
        '[[stages]]\nname = "see"\nobjective = "dense"\ndense_targets = ["presence", "position", "offset"]\n'
        '[[stages]]\nname = "speak"\nobjective = "language"\nquestions = ["general"]\nquestions_per_picture = 5\n'
        'freeze = ["vision", "projector"]\ncache_features = true\n'
        '[[stages]]\nname = "join"\nobjective = "language"\nquestions = ["general"]\nquestions_per_picture = 5\n'
        'auxiliary = { dense = 0.3 }\ndense_targets = ["presence", "position", "offset"]\n'
    )
    out = tmp_path / "out"
    data = str(scenes.path)
    assert main(["train", str(recipe), "--data", data, "--out", str(out)]) == 0
    from safetensors.torch import load_file

    see, speak, join = (
        load_file(out / stage / "checkpoints" / "step-000002" / "model.safetensors")
        for stage in ("see", "speak", "join")
    )
    seeing = [name for name in see if "vision" in name or "visual" in name or "image_to_text" in name]
    assert seeing and all(torch.equal(see[name], speak[name]) for name in seeing)
    assert any(not torch.equal(see[name], join[name]) for name in seeing)
    assert torch.equal(see["backbone.dense.heads.offset.weight"], speak["backbone.dense.heads.offset.weight"])
    facts = read_json(out / "join" / "checkpoints" / "step-000002" / "manifest.json")["facts"]
    assert facts["lineage"]["stages"] == ["dense", "language", "language+dense"]
