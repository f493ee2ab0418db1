"""The formulas behind a report's numbers: each with its meaning, its source and the code that computes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One measure or test."""

    name: str
    formula: str
    """In Unicode; several lines where it has several parts."""
    meaning: str
    """Range, what it is taken over, and what it cannot tell."""
    home: str
    """What computes it, by its name in the package."""
    source: str = ""
    """Publication; empty for what is the kit's own or elementary."""


METHODS = {
    "SAEs": (
        Method(
            "SAE",
            "h = W_encᵀ (x − b_pre) + b_enc,   z = act(h),   x̂ = W_decᵀ z + b_dec",
            "x is a token of an update, (d_in,), z its code, (d_sae,); b_pre is b_dec with subtract_b_dec, else 0. "
            "Top-K: z = max(h, 0) where h is among the k largest of its token, else 0, so that at most k entries are "
            "not 0. BatchTopK: in training max(h, 0) where h is among the k · n largest of a batch of n tokens; in use "
            "h where it is above one threshold for all latents, else 0. JumpReLU: h where it is above a learnt "
            "threshold θ ≥ 0 of each latent, else 0. Decoder rows have length 1. Where the configuration says so, "
            "tokens are scaled or whitened before and x̂ is scaled back.",
            "sae.SAE",
            "Gao et al. 2024 (arXiv 2406.04093); Bussmann et al. 2024; Rajamanoharan et al. 2024; Surkov et al. 2024 "
            "(arXiv 2410.22366)",
        ),
        Method(
            "Explained variance",
            "1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖²",
            "Over all held-out tokens and channels: 1 is perfect, 0 no better than the mean. Nothing else carries this "
            "name. Per channel, where a table says so: the mean over channels c of 1 − Var(x_c − x̂_c) / Var(x_c).",
            "metrics.explained_variance",
        ),
        Method(
            "L0",
            "mean over tokens of |{i : z_i > 0.001}|",
            "Latents that fire on a token, as measured: with Top-K k or fewer.",
            "metrics.ReconstructionMetrics.l0",
        ),
        Method(
            "Dead share",
            "|{i : z_i ≤ 0.001 on all n tokens}| / d_sae",
            "It falls with n, which is told beside it: a latent that has not fired yet may still do so.",
            "evaluation.evaluate",
        ),
        Method(
            "Controls of an SAE",
            "untrained SAE, raw channels, principal axes",
            "SAEs of the same L0 that were not trained: random decoder rows of the same number; the channels of the "
            "update, up and down; the principal axes of training tokens, up and down. Everything that is claimed of an "
            "SAE's features is measured of these in the same way.",
            "evaluation.controls",
        ),
        Method(
            "Matched latents",
            "max over one-to-one assignments π of Σ cos(d_i, d′_π(i))",
            "Decoder rows d of two SAEs. Beside it the same of SAEs whose rows' entries are dealt out anew along their "
            "principal axes (shuffled), and of untrained ones.",
            "metrics.matched_cosine",
            "Kuhn 1955 (assignment)",
        ),
        Method(
            "Participation ratio",
            "(Σλ)² / Σλ²",
            "λ: eigenvalues of the tokens' covariance. How many directions carry the variance, 1 to d_in.",
            "metrics.participation_ratio",
        ),
    ),
    "Features": (
        Method(
            "Density",
            "|{tokens : z > 0.001}| / tokens",
            "Share of all tokens on which a latent fires. Mean and standard deviation are over those tokens.",
            "features.FeatureStats",
        ),
        Method(
            "Moran's I",
            "(N / E) Σ_edges (z_i − m)(z_j − m) / Σ_i (z_i − m)²",
            "Of a heat map of N tokens with mean m, over the E pairs that touch at a side: near 1 for smooth regions, "
            "−1 / (N − 1) on average without spatial order.",
            "firing.Tally",
            "Moran 1950",
        ),
        Method(
            "Specificity",
            "mean over pairs i ≠ j of sim(image_i, image_j)",
            "How alike a latent's strongest images are to a judge; beside it what random sets of as many images of "
            "other prompts give, and the same of an untrained SAE.",
            "similarity.Specificity",
        ),
        Method(
            "AUC",
            "(Σ₊ r / n₊ − (n₊ + 1) / 2) / n₋",
            "The probability that an image that shows something has the higher strength than one that does not; r are "
            "ranks, ties count half; ½ is chance. The latent is chosen on training images and measured on held-out "
            "ones: a number read off the images it was chosen on would be too high. Controls are chosen and measured "
            "in the same way.",
            "metrics.areas_under_curve",
            "Mann and Whitney 1947",
        ),
        Method(
            "Balanced accuracy",
            "(right active / active + right inactive / inactive) / 2",
            "Of a label, told to somebody who sees held-out images with the latent active and without it, shuffled and "
            "without any hint. ½ is guessing. The control puts another feature's label to the same images.",
            "label_lines.LabelTest.balanced_accuracy",
        ),
        Method(
            "Cohen's κ",
            "(p_o − p_e) / (1 − p_e)",
            "Agreement p_o of two authors on the features that both labelled, beyond the agreement p_e that their own "
            "frequencies of words would give.",
            "label_agreement.cohens_kappa",
            "Cohen 1960; mean over pairs: Light 1971",
        ),
    ),
    "Effects": (
        Method(
            "Effect of an edit",
            "mean |picture with the edit − picture without it|",
            "Both are drawn from the same prompt and noise. Inside: over the pixels of tokens on which the feature "
            "fires in the picture as it is; outside: over the others. Controls subtract the same amounts at the same "
            "tokens along a random direction, a decoder row of an untrained SAE or a random mixture of features, or "
            "turn off the feature of the nearest density.",
            "studies.ablation.ablate",
        ),
        Method(
            "Locality",
            "effect inside / effect outside",
            "1 where an edit changes the whole picture alike. Only over prompts that have an outside.",
            "studies.results.Ablation.rows",
        ),
        Method(
            "Reading of a dose",
            "1 + x · u Σw² / ‖u‖²,   u = Σ w x over the other doses",
            "The dose that a picture shows, by a line through the pictures of the other doses; x is its change from "
            "dose 1, w a dose less their mean. Where changes have nothing to do with doses, Spearman's ρ of reading "
            "and dose is 0 on average.",
            "studies.statistics.read_doses",
        ),
        Method(
            "Semantic distance",
            "1 − Σ √(p q)",
            "p and q: the judge's probabilities of a factor's values on two pictures. 0 where it says the same of "
            "both, 1 where no value is in both.",
            "studies.statistics.bhattacharyya",
            "Bhattacharyya 1943",
        ),
        Method(
            "Repaired",
            "1 − d(x̂) / d(0)",
            "Share of the damage of zero-ablation (the update replaced by 0) that a reconstruction in the update's "
            "place repairs; d is the distance from the clean picture.",
            "studies.splicing.Splicing.rows",
        ),
        Method(
            "Attribution",
            "Σ over tokens, steps and guidance halves of z · ∂value / ∂z",
            "To first order what a number read off the picture loses when the latent is turned off; checked by turning "
            "latents off.",
            "studies.attribution.Attribution",
        ),
        Method(
            "Log-odds",
            "ln(p / (1 − p))",
            "p: the judge's probability of a value. An edit moves its target where this changes as expected.",
            "studies.selected.Outcome",
        ),
        Method(
            "Equal damage",
            "½ [(a − B(d_a)) + (A(d_b) − b)]",
            "a, b: what two methods reach at their best, at damages d_a and d_b; A, B: the upper concave hulls of what "
            "their settings reach over damage, no edit being at damage 0. Damage is 1 − the share of other factors "
            "that stay as they were. Settings and hulls are chosen on one half of the items for the other.",
            "studies.equal_damage.compare_at_equal_damage",
        ),
    ),
    "Blocks and models": (
        Method(
            "ω²",
            "(SS_between − (g − 1) · MS_within) / (SS_total + MS_within),   MS_within = SS_within / (n − g)",
            "Share of the variance over n images of a latent's strength that a factor of g values explains, corrected "
            "for chance; 0 where that is negative.",
            "studies.descriptors.omega_squared",
            "Hays 1963",
        ),
        Method(
            "Mutual information",
            "Σ p(b, c) log₂ (p(b, c) / (p(b) p(c)))",
            "What a feature's cluster c tells of its block b, as a share of the block's entropy, less what it tells of "
            "shuffled blocks.",
            "studies.contrasts.association",
            "Shannon 1948",
        ),
        Method(
            "Adjusted Rand index",
            "(agreeing pairs − expected) / (most − expected)",
            "Of two clusterings: 1 where they are the same, 0 on average by chance.",
            "studies.clustering.measure_stability",
            "Hubert and Arabie 1985",
        ),
        Method(
            "Standardised difference",
            "(mean₁ − mean₂) / pooled standard deviation",
            "Cohen's d, of the features of one block and of the others; q is that of Welch's t-test.",
            "studies.contrasts.contrasts",
            "Cohen 1969; Welch 1947",
        ),
        Method(
            "Vanished and appeared latents",
            "density there / density here < 0.1, upper end of its interval < ½",
            "Of the latents that fire on at least 5 prompts here; on the same prompts, each at the row where its "
            "density is greatest.",
            "studies.densities.lost",
        ),
        Method(
            "Kendall's τ-b",
            "(concordant − discordant) / √((pairs − ties₁)(pairs − ties₂))",
            "Of two rankings of the blocks, by random halves of the prompts.",
            "studies.block_ranking.BlockRanking.stability",
            "Kendall 1945",
        ),
        Method(
            "Spearman's ρ",
            "Pearson's correlation of the ranks, ties sharing theirs",
            "−1 to 1; 0 on average where two orders have nothing to do with each other.",
            "studies.rank_agreement.spearman",
            "Spearman 1904",
        ),
    ),
    "Intervals and tests": (
        Method(
            "Bootstrap interval",
            "2.5 % and 97.5 % quantiles of the statistic over resampled clusters",
            "A cluster is what is independent: a prompt, an image or a feature, as the table says; what belongs to one "
            "cluster is averaged first. It tells nothing of other seeds of the SAE, models or kinds of prompts.",
            "metrics.bootstrap_interval",
            "Efron 1979",
        ),
        Method(
            "Wilson's interval",
            "(p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n),   z = 1.96",
            "Of a share p of n; not of width 0 where all are or none is.",
            "studies.statistics.wilson",
            "Wilson 1927",
        ),
        Method(
            "Newcombe's interval",
            "b − ½ √((p₁ − l₁)² + (p₂ − l₂)²)  to  b + ½ √((u₁ − p₁)² + (u₂ − p₂)²)",
            "Of the balanced accuracy b: the hybrid of the Wilson intervals [l, u] of the two shares p.",
            "label_lines.LabelTest.interval",
            "Newcombe 1998",
        ),
        Method(
            "Student's interval",
            "mean ± t s / √n",
            "Of means over images, taken as independent.",
            "firing.Moments.interval",
            "Student 1908",
        ),
        Method(
            "Sign-flip test",
            "share of flips of the pairs' signs with as large a mean",
            "One-sided p-value of paired differences: over all flips for up to 13 pairs, for more (1 + hits) / 10,001 "
            "of 10,000 random ones. p against several controls at once is the largest of them.",
            "studies.statistics.sign_flip_p",
            "Fisher 1935",
        ),
        Method(
            "False discovery rate",
            "q_(i) = min over j ≥ i of m p_(j) / j",
            "Of m p-values in order: the rate at which each would just be called a discovery.",
            "studies.statistics.benjamini_hochberg",
            "Benjamini and Hochberg 1995",
        ),
        Method(
            "Permutation p",
            "(1 + shuffles with as much) / (1 + shuffles)",
            "Of associations and of orders of blocks; never 0. All orders are taken where there are few.",
            "studies.agreements.agreement",
        ),
    ),
}
"""By the part of the work that they belong to."""
