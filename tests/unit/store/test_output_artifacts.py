from __future__ import annotations

from pathlib import Path

from icce_ray.store import Artifact, ArtifactWriter, Folder
from icce_ray.store.run_records import find_artifacts, with_inputs

NAMES = {stage: f"{number:016x}" for number, stage in enumerate(("images", "embed", "sample", "other"))}


def commit(root: Folder, stage: str, writer: ArtifactWriter | None = None, *inputs: str) -> Artifact:
    writer = writer or ArtifactWriter(root / stage / NAMES[stage])
    of_inputs = {name: f"{NAMES[name]}.r1" for name in inputs}
    return writer.commit(stage=stage, fingerprint=NAMES[stage], inputs=of_inputs, config={}, metrics={}, seconds=0.0)


def test_an_artifact_needs_its_inputs_and_those_that_hold_its_parts(tmp_path: Path) -> None:
    root = Folder.at(tmp_path)
    commit(root, "images")
    other = ArtifactWriter(root / "other" / NAMES["other"])
    part = other.write_bytes("part-0", b"abc")
    commit(root, "other", other)
    embed = ArtifactWriter(root / "embed" / NAMES["embed"])
    embed.add(part.model_copy(update={"folder": f"other/{NAMES['other']}"}))
    assert commit(root, "embed", embed, "images").read_bytes("part-0") == b"abc"
    (root / "sample" / NAMES["sample"]).write_bytes("part-0", b"unfinished")
    (root / "runs").write_bytes("a.json", b"{}")
    found = find_artifacts(root)
    assert {key: artifact is not None for key, artifact in found.items()} == {
        f"{stage}/{name}": stage != "sample" for stage, name in NAMES.items()
    }
    everything = {f"{stage}/{NAMES[stage]}" for stage in ("images", "embed", "other")}
    assert with_inputs({f"embed/{NAMES['embed']}"}, found) == everything
