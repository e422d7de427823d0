"""Ratings of simulated verdicts by statsmodels and plain Python: what sacpo's ratings are compared with.

    python scripts/make_rating_fixture.py crates/evaluate/tests/fixtures/ratings.json

Four policies answer 25 prompts; every pair is judged in both orders, with ties, shares and missing verdicts. Win rates are means
with their errors as an ordinary least squares fit with clusters gives them. Bradley–Terry strengths and the
length-controlled model are binomial GLMs, fitted to 1e-14, with the same errors. statsmodels' correction for few clusters
is turned off and G/(G−1) is put in its place. The paper's Elo is the loop that its authors publish
(compute_scores.py of their repository), written anew, over so many trials that its mean is known to a point.
"""

import math
import sys
from pathlib import Path

import numpy
import statsmodels.api as sm

from fixture_tools import write_json

POLICIES = ["base", "p", "q", "r"]
SKILL = {"base": 0.0, "p": 0.8, "q": -0.4, "r": 0.3}
PROMPTS = 25
TAIL = 0.1
ELO_TRIALS = 4000


def simulate(rng):
    """Rows of prompt, A, B, outcome, lengths of both answers, scores of both answers."""
    verdicts = []
    for prompt in range(PROMPTS):
        own = {name: SKILL[name] + rng.normal() for name in POLICIES}
        length = {name: int(rng.integers(50, 900)) for name in POLICIES}
        for i, a in enumerate(POLICIES):
            for b in POLICIES[i + 1 :]:
                for first, second in [(a, b), (b, a)]:
                    margin = own[first] - own[second] + 0.001 * (length[first] - length[second]) + rng.normal()
                    outcome = float(margin > 0)
                    kind = rng.random()
                    if kind < 0.1:
                        outcome = 0.5
                    elif kind < 0.2:
                        outcome = round(float(rng.random()), 3)
                    elif kind < 0.25:
                        outcome = None
                    scores = [round(5 + own[name] + float(rng.normal()), 2) for name in (first, second)]
                    verdicts.append([prompt, first, second, outcome, length[first], length[second], *scores])
    return verdicts


def clustered(fit_model, groups):
    """Parameters and covariance with clusters, and G/(G−1) as the only correction."""
    fitted = fit_model(cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False})
    count = len(set(groups))
    return fitted.params, fitted.cov_params() * count / (count - 1)


def binomial(outcomes, regressors, groups):
    model = sm.GLM(outcomes, regressors, family=sm.families.Binomial())
    return clustered(lambda **options: model.fit(tol=1e-14, maxiter=100, **options), groups)


def against_base(verdicts, name):
    """Prompt, outcome and difference of lengths of the verdicts on a policy and the baseline."""
    rows = []
    for prompt, a, b, outcome, length_a, length_b, *_ in verdicts:
        if {a, b} == {name, "base"} and outcome is not None:
            rows.append((prompt, outcome, length_a - length_b) if a == name else (prompt, 1 - outcome, length_b - length_a))
    return [numpy.array(column) for column in zip(*rows)]


def win_rate(verdicts, name):
    prompts, outcomes, longer = against_base(verdicts, name)
    ones = numpy.ones((len(outcomes), 1))
    mean, variance = clustered(lambda **options: sm.OLS(outcomes, ones).fit(**options), prompts)
    term = numpy.tanh(longer / longer.std(ddof=1))
    theta, covariance = binomial(outcomes, numpy.column_stack([ones, term]), prompts)
    rate = 1 / (1 + math.exp(-theta[0]))
    return {
        "win_rate": 100 * mean[0],
        "standard_error": 100 * math.sqrt(variance[0, 0]),
        "length_controlled": {
            "win_rate": 100 * rate,
            "standard_error": 100 * rate * (1 - rate) * math.sqrt(covariance[0, 0]),
            "length_coefficient": theta[1],
        },
    }


def bradley_terry(verdicts):
    """Ratings and errors, 1000 at the baseline, whose regressor is left out."""
    rows = [row for row in verdicts if row[3] is not None]
    regressors = numpy.zeros((len(rows), len(POLICIES) - 1))
    for i, (_, a, b, *_) in enumerate(rows):
        for name, sign in [(a, 1), (b, -1)]:
            if name != "base":
                regressors[i, POLICIES.index(name) - 1] = sign
    theta, covariance = binomial(numpy.array([row[3] for row in rows]), regressors, [row[0] for row in rows])
    points = 400 / math.log(10)
    return {
        name: {"rating": 1000 + points * theta[i], "standard_error": points * math.sqrt(covariance[i, i])}
        for i, name in enumerate(POLICIES[1:])
    }


def scores(verdicts, name):
    """The mean of the scores by prompt, and of the worst tenth: 2.5 prompts."""
    by_prompt = {}
    for prompt, a, b, _, _, _, score_a, score_b in verdicts:
        for policy, score in [(a, score_a), (b, score_b)]:
            if policy == name:
                by_prompt.setdefault(prompt, []).append(score)
    means = numpy.sort([numpy.mean(values) for values in by_prompt.values()])
    count = TAIL * len(means)
    whole = int(count)
    tail = (means[:whole].sum() + (count - whole) * means[whole]) / count
    return {"mean": means.mean(), "tail_mean": tail}


def paper_elo(verdicts, rng):
    """Mean and spread over trials; every row has one verdict, so that rows are what is shuffled."""
    ratings = []
    for _ in range(ELO_TRIALS):
        rating = dict.fromkeys(POLICIES, 1200.0)
        for _ in range(10):
            for i in rng.permutation(len(verdicts)):
                _, a, b, outcome, *_ = verdicts[i]
                outcome = 0.5 if outcome is None else outcome
                won = 1.0 if outcome > 0.5 else 0.0 if outcome < 0.5 else 0.5
                gain = 32 * (won - 1 / (1 + 10 ** ((rating[b] - rating[a]) / 400)))
                rating[a] += gain
                rating[b] -= gain
        ratings.append([rating[name] * 1000 / rating["base"] for name in POLICIES])
    mean, deviation = numpy.mean(ratings, axis=0), numpy.std(ratings, axis=0)
    return {name: {"elo": mean[i], "elo_deviation": deviation[i]} for i, name in enumerate(POLICIES)}


def main():
    rng = numpy.random.default_rng(0)
    verdicts = simulate(rng)
    strengths, elo = bradley_terry(verdicts), paper_elo(verdicts, rng)
    models = {}
    for name in POLICIES[1:]:
        models[name] = win_rate(verdicts, name)
        models[name] |= {"bradley_terry": strengths[name], "scores": scores(verdicts, name), "paper": elo[name]}
    numbers = lambda value: {k: numbers(v) for k, v in value.items()} if isinstance(value, dict) else float(value)
    write_json(Path(sys.argv[1]), {"verdicts": verdicts, "models": numbers(models)})


main()
