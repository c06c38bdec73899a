"""The quality of the demo: a classifier of real digits sees in its samples the digits that were asked for."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from ddpm_fast.diffusion.samplers import FEW_STEPS
from ddpm_fast.training.checkpoint import load_checkpoint
from ddpm_fast.training.data import DigitsDataset

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def classifier():
    """Support vector machine of the real digits, and its mean top probability on those held out.

    Of scikit-learn's classifiers it is the least easily pleased: its probabilities fall off away from real digits.
    """
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    digits = DigitsDataset()
    train_images, held_out, train_labels, held_out_labels = train_test_split(
        digits.images.flatten(1).numpy(), digits.labels.numpy(), test_size=0.3, random_state=0, stratify=digits.labels
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        fitted = SVC(probability=True, random_state=0).fit(train_images, train_labels)
    assert fitted.score(held_out, held_out_labels) > 0.97
    return fitted, fitted.predict_proba(held_out).max(axis=1).mean()


def judge(images, classifier):
    """Counts of the ten classes, and mean top probability relative to that on held-out real digits."""
    fitted, real_confidence = classifier
    probabilities = fitted.predict_proba(images.clamp(0, 1).flatten(1).numpy())
    counts = np.bincount(probabilities.argmax(axis=1), minlength=10)
    return counts, probabilities.max(axis=1).mean() / real_confidence


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The demo's own configuration, stopped early: `make demo` trains longer."""
    folder = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-m", "ddpm_fast", "train", "digits", "--labels", "digits", "--seed", "0"]
    # One thread: beside other work on two cores, two threads wait for each other more than they compute.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--steps", "650", "--results-folder", str(folder)], check=True, env=environment)
    return load_checkpoint(folder / "model-last.pt").ema.ema_model.eval()


def asked_for(each):
    """Every digit `each` times."""
    return torch.arange(10).repeat_interleave(each)


@pytest.mark.slow
@pytest.mark.release
def test_digits_are_those_that_were_asked_for(trained, classifier):
    """The classifier sees 95 of 100 as the class, and is nearly as sure of them as of real digits."""
    classes = asked_for(20)
    images = trained.sample(classes=classes, seed=0, progress=False)
    seen = classifier[0].predict(images.clamp(0, 1).flatten(1).numpy())
    share = float((seen == classes.numpy()).mean())
    counts, confidence = judge(images, classifier)
    print(f"{share:.3f} as asked for, classes {counts.tolist()}, confidence {confidence:.3f} of that on real digits")
    assert share >= 0.95
    assert (counts > 0).all()
    assert confidence >= 0.8


@pytest.mark.slow
@pytest.mark.release
def test_without_guidance_the_classes_are_still_there(trained, classifier):
    """The condition itself is learned; a guidance scale does no more than sharpen it."""
    classes = asked_for(20)
    shares = {}
    for scale in (0.0, 1.0):
        images = trained.sample(classes=classes, guidance=scale, seed=0, progress=False)
        shares[scale] = float((classifier[0].predict(images.clamp(0, 1).flatten(1).numpy()) == classes.numpy()).mean())
    print(shares)
    assert shares[0.0] < 0.3 and shares[1.0] > 0.8


@pytest.mark.slow
@pytest.mark.release
def test_twelve_calls_of_the_sampler_for_few_steps_score_as_250_of_ddim(trained, classifier):
    scores = {}
    for sampler, calls in ((FEW_STEPS, 12), ("ddim", 250)):
        batches = [
            trained.sample(classes=asked_for(40), sampler=sampler, sampling_timesteps=calls, seed=seed, progress=False)
            for seed in (0, 1)
        ]
        counts, scores[sampler] = judge(torch.cat(batches), classifier)
        assert (counts > 0).all()
    print(scores)
    assert scores[FEW_STEPS] >= 0.98 * scores["ddim"]


def test_the_measure_is_not_fooled(classifier):
    """Noise, blends of two digits and one digit repeated would not pass."""
    images = DigitsDataset().images[:200]
    generator = torch.Generator().manual_seed(0)
    _, noise_confidence = judge(torch.rand(images.shape, generator=generator), classifier)
    _, blend_confidence = judge((images + images.flip(0)) / 2, classifier)
    repeated_counts, _ = judge(images[:1].expand(200, -1, -1, -1), classifier)
    assert noise_confidence < 0.75
    assert blend_confidence < 0.75
    assert (repeated_counts > 0).sum() == 1
