"""Nothing is unpacked or cached outside of a test's own folder."""

import pytest


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
    return folder
