"""The demo's model: made once, also where several processes begin at the same moment."""

from pathlib import Path

import pytest

from mistral_dist import demo
from mistral_dist.errors import ModelError


@pytest.mark.parametrize("other", ["config.json", "something-else"])
def test_another_process_may_be_faster(other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"

    def convert(_gguf: Path, made: Path) -> None:
        for folder in (made, target):
            folder.mkdir()
        (made / "config.json").write_text("ours")
        (target / other).write_text("theirs")

    monkeypatch.setattr(demo, "_download", lambda folder: folder)
    monkeypatch.setattr(demo, "_convert", convert)
    if other == "config.json":
        assert (demo.make_model(target) / other).read_text() == "theirs"
    else:
        with pytest.raises(ModelError, match="move what is there away"):
            demo.make_model(target)
    assert list(tmp_path.iterdir()) == [target], "nothing is left beside it"
