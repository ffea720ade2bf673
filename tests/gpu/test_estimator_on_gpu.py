"""The whole of the maths on a GPU against the same on a CPU, on real images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from icce_ray import ICCE, clustering_accuracy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return (data.data / 16).astype(np.float16), data.target.astype(np.int64)


@pytest.mark.slow
def test_a_gpu_clusters_as_a_cpu_does(digits) -> None:
    features, labels = digits
    fitted = [
        ICCE(10, n_heads=8, epochs=30, random_state=0, device=device, classifier={"num_iterations": 400}).fit(features)
        for device in ("cpu", "cuda")
    ]
    cpu, gpu = fitted
    assert gpu.similarity_threshold_ == cpu.similarity_threshold_
    accuracies = [clustering_accuracy(labels, model.labels_) for model in fitted]
    assert min(accuracies) > 0.8
    assert abs(accuracies[0] - accuracies[1]) < 0.05
    assert (gpu.predict(features) == gpu.labels_).mean() > 0.9
    again = ICCE(10, n_heads=8, epochs=30, random_state=0, device="cuda", classifier={"num_iterations": 400})
    assert clustering_accuracy(gpu.labels_, again.fit(features).labels_) > 0.97
