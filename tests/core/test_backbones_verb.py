"""`vlm4vla backbones` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm4vla_core.backbone import tiny
from vlm4vla_core.cli import main


def test_the_table_lists_every_known_model(tmp_path: Path, capsys):
    assert main(["backbones", "--freeze", "vision", "projector", "--json", str(tmp_path / "b.json")]) == 0
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "b.json").read_text())
    assert len(written["sizes"]) == 10 and len(written["families"]) >= 13
    for size in written["sizes"]:
        assert size["name"] in shown and size["trained"] == size["headless"] + size["new"] - sum(
            size["parts"][part] for part in ("vision", "projector")
        )
    assert "frozen: vision, projector" in shown and "16 bytes for each trained parameter" in shown


def test_one_model_part_by_part(capsys):
    assert main(["backbones", "PaliGemma-1", "--freeze", "word_embeddings", "--lora", "decoder"]) == 0
    shown = capsys.readouterr().out
    assert "526,778,368  frozen" in shown and "adapters" in shown
    assert "its own arithmetic gives 2.4" in shown and "256 tokens" in shown


def test_a_checkpoint_of_this_project(tmp_path: Path, capsys):
    backbone = tiny(image_size=56)
    backbone.save(tmp_path / "ck")
    assert main(["backbones", str(tmp_path / "ck"), "--freeze", "vision"]) == 0
    shown = capsys.readouterr().out
    count = sum(p.numel() for name, p in backbone.named_parameters() if backbone.groups()[name].startswith("vision."))
    assert f"{count:,}  frozen" in shown and "family qwen2_5_vl" in shown and "56 px: 4 tokens" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no such folder, hub id or known model"),
        (["./nowhere"], "no such"),
        ([".", "--chunk", "0"], "at least 1"),
        (["."], "has no config.json"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, words: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    assert main(["backbones", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
