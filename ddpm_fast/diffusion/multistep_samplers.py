"""Samplers whose steps read what the steps before found: DPM-Solver++(2M) and (3M), UniPC, LMS, DEIS.

Every one is finite where the first level has no signal (a = 0): its step there is of first order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ddpm_fast.diffusion.samplers import Rows, Walk, sampler, steps_in_half_log_snr, to_level


@sampler("dpmpp_2m", spacing="log_snr")
def dpmpp_2m(walk: Walk) -> Rows:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); its first and last step are of first order.

    x ← (b_after/b)·x − a_after·(e^(−h) − 1)·D with D = (1 + 1/(2ρ))·x0 − 1/(2ρ)·x0_previous, ρ = h_previous/h and h the
    step in λ. The last step ends on the data (h = ∞), where x is x0.
    """
    now, after = walk.now, walk.after
    h = steps_in_half_log_snr(walk)
    s = after.b / now.b
    x_start_factor = -after.a * torch.expm1(-h)
    correction = torch.zeros_like(h)
    correction[1:] = h[1:] / (2 * h[:-1])
    correction[-1] = 0
    return Rows(now, x_start_factor * (1 + correction), s, -x_start_factor * correction, torch.zeros_like(h))


class _SdeStep(NamedTuple):
    """x ← s·x + r·x0 + σ·ε of first order, and the ratios to the steps before, of DPM-Solver++ for the SDE."""

    h: torch.Tensor  # (S,) in λ, times 1 + η
    r: torch.Tensor
    s: torch.Tensor
    sigma: torch.Tensor
    ratio: torch.Tensor  # (S,) h of the step before over h of this; infinite where there is none to use


def _sde_step(walk: Walk, eta: float, s_noise: float) -> _SdeStep:
    """The exact solution for a constant x0 (Lu et al. 2022, appendix; k-diffusion's `sample_dpmpp_2m_sde`)."""
    now, after = walk.now, walk.after
    h = steps_in_half_log_snr(walk)
    decay = (-eta * h).exp() if eta else torch.ones_like(h)
    noise = (-torch.expm1(-2 * eta * h)).sqrt() if eta else torch.zeros_like(h)
    ratio = torch.full_like(h, math.inf)
    ratio[1:] = h[:-1] / h[1:]
    ratio[-1] = math.inf  # to the data: first order
    return _SdeStep(
        h=(1 + eta) * h,
        r=-after.a * torch.expm1(-(1 + eta) * h),
        s=after.b / now.b * decay,
        sigma=s_noise * after.b * noise,
        ratio=ratio,
    )


@sampler("dpmpp_2m_sde", spacing="log_snr")
def dpmpp_2m_sde(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0, solver: str = "midpoint") -> Rows:
    """DPM-Solver++(2M) for the SDE (k-diffusion's `sample_dpmpp_2m_sde`); its first and last step are of first order.

    Args:
        eta: the noise; 0 is deterministic.
        s_noise: what the noise is multiplied with.
        solver: "midpoint" or "heun", how the slope of x0 enters.
    """
    _check_word("solver", solver, ("midpoint", "heun"))
    step = _sde_step(walk, eta, s_noise)
    slope = 0.5 * step.r if solver == "midpoint" else walk.after.a * _phi_2(step.h)
    correction = slope / step.ratio
    return Rows(walk.now, step.r + correction, step.s, -correction, step.sigma)


@sampler("dpmpp_3m_sde", spacing="log_snr")
def dpmpp_3m_sde(walk: Walk, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """DPM-Solver++(3M) for the SDE (k-diffusion's `sample_dpmpp_3m_sde`); its last step is of first order.

    Args:
        eta: the noise; 0 is deterministic.
        s_noise: what the noise is multiplied with.
    """
    step = _sde_step(walk, eta, s_noise)
    a, h, ratio = walk.after.a, step.h, step.ratio
    phi_2 = a * _phi_2(h)
    phi_3 = a * torch.where(h.isinf(), -0.5, (1 + torch.expm1(-h) / h) / h - 0.5)
    before = torch.full_like(ratio, math.inf)  # h of the step before the last over h
    before[2:] = ratio[1:-1] * ratio[2:]
    before[-1] = math.inf
    is_third = before.isfinite() & ratio.isfinite()
    r0, r1 = torch.where(is_third, ratio, 1.0), torch.where(is_third, before, 1.0)
    bend = torch.where(is_third, (phi_2 * r0 - phi_3) / (r0 + r1), 0.0)
    newest = (phi_2 + bend) / ratio  # of x0 − x0_previous
    oldest = -bend / r1  # of x0_previous − x0_previous2
    u = torch.stack([oldest - newest, -oldest], dim=1)
    return Rows(walk.now, step.r + newest, step.s, u, step.sigma)


def _phi_2(h: torch.Tensor) -> torch.Tensor:
    """1 + (e^(−h) − 1)/h, the weight of the slope of x0 in λ; 1 for an infinite h."""
    return torch.where(h.isinf(), 1.0, 1 + torch.expm1(-h) / h)


@sampler("unipc", spacing="log_snr")
def unipc(walk: Walk, *, order: float = 2.0, solver: str = "bh2") -> Rows:
    """UniPC (Zhao et al. 2023, algorithms 5 and 6 for x0), as diffusers' `UniPCMultistepScheduler`.

    A row corrects the state by its own network call, and then predicts the next one. Its last steps are of lower order.

    Args:
        order: 1, 2 or 3 of the predictor; the corrector's is one more.
        solver: "bh1" or "bh2", the B(h) of the paper.
    """
    _check_word("solver", solver, ("bh1", "bh2"))
    _check_order(order, 3)
    lambdas = walk.now.half_log_snr.tolist()
    count = len(lambdas)
    base_r, base_s = (column.tolist() for column in to_level(walk.now, walk.after))
    a_after = walk.after.a.tolist()
    rows: list[list[float]] = []  # r, s, u, u2, u3
    predictor = [0.0, 0.0, 0.0]  # of the row before: the factors of its D1, see `_unipc_weights`
    for i in range(count):
        corrected = [0.0, 0.0, 0.0, 0.0]  # of this x0 and those before
        known = sum(math.isfinite(value) for value in lambdas[:i])
        if i > 0 and math.isfinite(lambdas[i - 1]):
            p = min(int(order), count - i + 1, sum(math.isfinite(value) for value in lambdas[: i - 1]) + 1)
            h = lambdas[i] - lambdas[i - 1]
            ratios = [(lambdas[i - 1 - k] - lambdas[i - 1]) / h for k in range(1, p)]
            *weights, own = _unipc_weights(h, [*ratios, 1.0], solver, corrects=True)
            change = [a_after[i - 1] * (w - v) / k for w, v, k in zip(weights, predictor, ratios, strict=False)]
            own *= a_after[i - 1]
            corrected = [own, -own - sum(change), *change, *[0.0] * (2 - len(change))]
        row = [base_s[i] * value for value in corrected]
        row[0] += base_r[i]
        p = min(int(order), count - i, known + 1)
        predictor = [0.0, 0.0, 0.0]
        if p > 1:
            h = (walk.after.half_log_snr[i] - walk.now.half_log_snr[i]).item()
            ratios = [(lambdas[i - k] - lambdas[i]) / h for k in range(1, p)]
            predictor = _unipc_weights(h, ratios, solver, corrects=False)
            for k, (weight, ratio) in enumerate(zip(predictor, ratios, strict=True), 1):
                row[k] += a_after[i] * weight / ratio
                row[0] -= a_after[i] * weight / ratio
        rows.append([row[0], base_s[i], *row[1:]])
    r, s, *u = torch.tensor(rows, dtype=torch.float64, device="cpu").unbind(1)
    return Rows(walk.now, r, s, torch.stack(u, dim=1), torch.zeros_like(r))


def _unipc_weights(h: float, ratios: list[float], solver: str, *, corrects: bool) -> list[float]:
    """−B(h)·ρ of Zhao et al. 2023, eq. 11: the factors of (x0_k − x0_0)/ratio_k over a, for steps h in λ.

    A predictor of order 2 and a corrector of order 1 take ρ = ½ instead of the solution.
    """
    big_b = -h if solver == "bh1" else math.expm1(-h)
    if len(ratios) == 1:
        return [-big_b / 2]
    matrix, right = [], []
    phi, factorial = math.expm1(-h) / -h - 1, 1
    for i in range(1, len(ratios) + 1):
        matrix.append([ratio ** (i - 1) for ratio in ratios])
        right.append(phi * factorial / big_b)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    solution = torch.linalg.solve(*(torch.tensor(v, dtype=torch.float64, device="cpu") for v in (matrix, right)))
    return [-big_b * rho for rho in solution.tolist()]


@sampler("lms", spacing="log_snr")
def lms(walk: Walk, *, order: float = 3.0) -> Rows:
    """Adams–Bashforth in σ, or in a flow's time, of the slopes (k-diffusion's `sample_lms`, of order up to 3).

    Its last step is of first order.
    """
    n = walk.now.a + walk.now.b if walk.is_flow else walk.now.a
    c = walk.now.b / n
    return _adams_rows(walk, order, n, c.tolist(), c.tolist(), lambda value: 1.0)


@sampler("deis", spacing="log_snr")
def deis(walk: Walk, *, order: float = 3.0) -> Rows:
    """DEIS, tAB in log ρ (Zhang & Chen 2023, section 3), as diffusers' `DEISMultistepScheduler`, of order up to 3.

    Its last step is of first order, the one before of second at most.
    """
    sigma = walk.now.sigma
    return _adams_rows(walk, order, walk.now.a, sigma.tolist(), sigma.log().tolist(), math.exp, last_orders=(1, 2))


def _adams_rows(
    walk: Walk,
    order: float,
    n: torch.Tensor,
    c: list[float],
    variable: list[float],
    density: Callable[[float], float],
    last_orders: tuple[int, ...] = (1,),
) -> Rows:
    """Steps of X = x/n in c along the slopes d = (X − x0)/c, polynomials through the last of them in a variable of c.

    A row keeps d = x/b − (n/b)·x0. `density` is dc over d(variable).
    """
    _check_order(order, 3)
    now, after = walk.now, walk.after
    count = len(c)
    r, s = to_level(now, after)
    u = torch.zeros(count, 3, dtype=torch.float64, device="cpu")
    e, f = 1 / now.b, -n / now.b
    n_after = (n[1:] if count > 1 else n).tolist()
    for i in range(count - 1):
        known = sum(math.isfinite(value) for value in variable[:i])
        left = count - 1 - i
        p = min(int(order), known + 1, last_orders[left] if left < len(last_orders) else 3)
        if p == 1 or not math.isfinite(variable[i]):
            continue
        nodes = [variable[i - k] for k in range(p)]
        weights = _lagrange_integrals(nodes, variable[i + 1], density)
        # Euler's step has all of c' − c on the newest slope.
        change = n_after[i] * (weights[0] - (c[i + 1] - c[i]))
        s[i] += change * e[i]
        r[i] += change * f[i]
        u[i, 1:p] = n_after[i] * torch.tensor(weights[1:], dtype=torch.float64, device="cpu")
    return Rows(now, r, s, u, torch.zeros_like(r), kept=torch.stack([e, f], dim=1))


def _lagrange_integrals(nodes: list[float], end: float, density: Callable[[float], float]) -> list[float]:
    """∫ of each Lagrange polynomial over the nodes, times the density, from the first node to the end."""
    start = nodes[0]
    totals = [0.0] * len(nodes)
    for point, weight in _gauss_legendre(24):
        at = start + (end - start) * (point + 1) / 2
        for j, node in enumerate(nodes):
            value = math.prod((at - other) / (node - other) for k, other in enumerate(nodes) if k != j)
            totals[j] += weight / 2 * (end - start) * density(at) * value
    return totals


@functools.cache
def _gauss_legendre(count: int) -> list[tuple[float, float]]:
    """Points and weights on [−1, 1] (Golub & Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64, device="cpu")
    beta = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return list(zip(points.tolist(), (2 * vectors[0] ** 2).tolist(), strict=True))


def _check_word(name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {value!r}")


def _check_order(order: float, most: int) -> None:
    if order not in range(1, most + 1):
        raise ValueError(f"order must be an integer from 1 to {most}, got {order:g}")
