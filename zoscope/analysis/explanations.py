"""What every notice means, why it matters, and what to do: the table behind reports and ``zoscope explain``.

It imports no torch. A test compares its codes with those that the package emits.
"""

from __future__ import annotations

from dataclasses import dataclass

PROVISIONAL = "provisional"
"""Code of the notice that full reports show beside the step size itself."""


@dataclass(frozen=True)
class Explanation:
    """A notice in general, without the numbers of a run.

    Args:
        clause: A few words for one line; empty where the message itself is short and says more.
        means: What was found.
        matters: Why a reader should care.
        remedy: What to do about it.
        serious: Whether the answer may be wrong or less than was asked for; others are good to know.
    """

    clause: str
    means: str
    matters: str
    remedy: str
    serious: bool = True

    @property
    def word(self) -> str:
        """What a line about it begins with."""
        return "Warning" if self.serious else "Note"


def _good_to_know(clause: str, means: str, matters: str, remedy: str) -> Explanation:
    return Explanation(clause, means, matters, remedy, serious=False)


# fmt: off
EXPLANATIONS: dict[str, Explanation] = {
    # --- no number here can be relied on
    "piecewise-constant": Explanation(
        "the loss only jumps; no step size can be derived",
        "Small steps do not change the loss at all; larger ones change it by jumps. It contains floor, round, argmax "
        "or a threshold, is an accuracy or a count, or is quantised.",
        "Such a loss has no curvature, and every threshold here comes from curvature.",
        "Measure a smooth loss that stands for it, such as cross-entropy for accuracy, or try step sizes with "
        "`zoscope plan --method replicas`.",
    ),
    "other-loss": Explanation(
        "the measured loss is not the one that is trained",
        "The loss of the training loop and the loss of the problem differ at the same parameters.",
        "Thresholds are those of the problem. Another loss, or a sum in place of a mean, has other ones.",
        "Compare the loss functions, class weights, further terms, the data, accumulated batches and dropout; or pass "
        "the problem that the loop really trains.",
    ),
    "sum-reduced": Explanation(
        "the loss is a sum over examples, not a mean",
        "The loss grows with the number of examples in a batch.",
        "Step sizes are for the sum. Those for the mean are as many times larger as a batch has examples.",
        "Return the mean over the batch if that is how you train.",
    ),
    "zero-curvature": Explanation(
        "no positive curvature here, so nothing limits lr locally",
        "No positive curvature was found: the loss is linear or concave around these parameters.",
        "All thresholds are infinite on the quadratic model. They say nothing about the loss further away.",
        "Measure at another point, for example after a few hundred steps, or run `zoscope plan`.",
    ),
    "trace-not-positive": Explanation(
        "Tr H is not positive; forward passes bound nothing",
        "The trace of the Hessian, as forward passes see it, is not above 0.",
        "Two moments of such a spectrum bound no threshold.",
        "Use `--curvature hessian`, which knows the positive part of the spectrum.",
    ),
    "no-curvature": Explanation(
        "the curvature could not be measured at some steps",
        "The curvature could not be measured at one of the steps of a run, for the reason given.",
        "The run has no threshold there; the training itself is not affected.",
        "Read the reason. A loss that is not finite usually means a step size above the threshold.",
    ),
    "noise-floor": Explanation(
        "no step size tried lowers the loss in so few steps",
        "No step size that was tried lowers the loss within the planned steps: the noise of the estimates holds it up.",
        "The answer is then a step size that does no harm, not one that trains.",
        "Use more steps, more queries (`--queries`) or larger batches.",
    ),
    "no-edge": Explanation(
        "no step size was found at which half of the runs diverge",
        "The search ended without a step size at which half of the runs diverge.",
        "How far the answer is from the edge is not known.",
        "Give the search more room: more `--replicas`, or a larger `--max-cost`.",
    ),
    # --- the recommendation is less sure than it looks
    PROVISIONAL: Explanation(
        "lr holds for now only; `zoscope plan` answers for your run",
        "The recommended step size comes from the curvature at the start, and there is a reason to expect another one "
        "soon: the reasons are the other notices, or the ends of η*(N) lie far apart.",
        "A run that begins with it can still diverge, or could go faster.",
        "Run `zoscope plan`, which looks ahead over the run; or measure again after some training.",
    ),
    "little-curvature": Explanation(
        "the curvature rises within the first few steps",
        "A few steps of gradient descent raise the trace by more than 3 times. A new head on a trained network starts "
        "like this.",
        "No step size from the start holds for a long run.",
        "Train for a while with a smaller step size, then measure again; or run `zoscope plan`.",
    ),
    "gradient-not-small": Explanation(
        "the run leaves the region where this curvature holds",
        "On the quadratic model the planned run would lower the loss by more than all of its value.",
        "Parameters move far enough for the curvature to change on the way, and the threshold with it.",
        "Run `zoscope plan`, or measure again as training goes on (`zoscope track`).",
    ),
    "leaves-quadratic": Explanation(
        "the noise of this lr leaves the quadratic model",
        "The noise of the planned steps moves the parameters so far that the loss rises more than its curvature "
        "promises.",
        "Runs can diverge earlier than predicted.",
        "Use a smaller step size or more queries; `zoscope probe` and `zoscope plan` try it.",
    ),
    "kinks": Explanation(
        "over short steps second derivatives miss curvature",
        "Over short steps the loss bends otherwise than its second derivatives say: it has kinks (ReLU, max-pooling, "
        "absolute values), a curvature that changes on the way, or an operation that hides its second derivative.",
        "The descent threshold is measured with the kinks, over the noise of ten optimizer steps; the others know "
        "second derivatives only and can be wrong by as much as the two differ.",
        "Keep a wider margin, compare with `--curvature forward`, or try it: `zoscope plan`, `zoscope probe`.",
    ),
    "step-size-check": Explanation(
        "differences of the loss disagree; error bars are wide",
        "Loss differences over half the distance give another curvature: the loss is rounded too coarsely, has kinks, "
        "or is smooth over short distances only.",
        "The error bars are as wide as the disagreement; the Hessian itself may lie outside.",
        "Let the loss end in float32 (logits.float()), or use a wider `--dtype`.",
    ),
    "mu": Explanation(
        "at this μ slopes are not right; the message names one",
        "At the μ of the run (`--mu`, which MeZO calls ε) two-point slopes of the loss are not within 10 % of the real "
        "ones.",
        "Steps then follow another function: too large a μ smooths the loss, too small a one measures its rounding.",
        "Use the μ that the message names.",
    ),
    "rounding": Explanation(
        "weights in 16 bits lose a part of each step",
        "Rounding the weights to their type takes off a part of every step, and many entries do not move at all.",
        "Training is slower than predicted, or stands still.",
        "Keep the weights in float32 besides (master weights), or take a larger step size.",
    ),
    "coarse": Explanation(
        "the rehearsal had not settled; real runs would be surer",
        "With twice as many macro steps the answer still moved by more than 5 %.",
        "The answer can be off by as much.",
        "Use `--method replicas`, which makes real runs.",
    ),
    "max-cost": Explanation(
        "--max-cost was reached; the answer is what was known by then",
        "The budget of forward passes was spent before the search was over.",
        "The answer is less precise, and a better step size may not have been tried.",
        "Raise `--max-cost`; with `--cache` what was done is not done again.",
    ),
    "precision": Explanation(
        "the precision of --rtol was not reached",
        "Within `--max-hvps` products the 95 % intervals did not become as narrow as `--rtol` asks.",
        "The intervals shown are right, only wider. Recommendations keep below their lower ends.",
        "Raise `--max-hvps` or `--rtol`; up to some thousands of parameters `--method dense` is exact.",
    ),
    "lambda-max": Explanation(
        "λ_max has not converged; raise --max-hvps",
        "The largest eigenvalue still moved when the products were spent.",
        "The first-order bound and the paper's lower bound are too high by about its residual.",
        "Raise `--max-hvps`.",
    ),
    "step-cap": Explanation(
        "the runs are too short to show growth; raise --max-steps",
        "The runs have fewer steps than the predicted growth above the threshold needs to show.",
        "A run above the threshold may look stable only because it ended too early.",
        "Raise `--max-steps` or `--steps`, or lower `--growth`.",
    ),
    "time-cap": Explanation(
        "--max-seconds cut runs short",
        "The time was up before every run had done its steps.",
        "Such a run is inconclusive.",
        "Raise `--max-seconds`.",
    ),
    # --- what is measured may not be what was meant
    "not-a-mean": Explanation(
        "the loss of a batch is not the mean over its examples",
        "The loss of a batch differs from the mean over its parts: class weights, ignored labels, padding, or examples "
        "that see one another.",
        "A mean over several batches is then another function than one large batch, with another curvature.",
        "Make one batch of them, or weight them with `batch_size_of`.",
    ),
    "batch-statistics": Explanation(
        "a layer in train mode uses the statistics of the batch",
        "A normalisation layer is in train mode and depends on which examples share a batch.",
        "The curvature is that of batches of this size; others have another one.",
        "Call model.eval() if you train or tune with running statistics.",
    ),
    "unused-parameters": Explanation(
        "some parameters have no effect on the loss",
        "Some parameter tensors have no effect on the loss of the first batch.",
        "Their curvature counts as zero. They may be a part of the model that was meant to be used.",
        "Check that the loss uses the whole model, or select parameters with `--params`.",
    ),
    "unknown-batch-size": Explanation(
        "the number of examples in a batch is not known",
        "A batch has no tensor with one row per example, so it counts as one example.",
        "Batches of different sizes then get the same weight, and step sizes per example cannot be told.",
        "Say how many examples a batch has with `batch_size_of=`.",
    ),
    "not-trained": Explanation(
        "some of the problem's parameters are not trained",
        "Some parameters of the problem are in no optimizer, or stand still.",
        "What is measured leaves them out.",
        "Check requires_grad and the optimizer's groups, if that is not intended.",
    ),
    "not-measured": Explanation(
        "the optimizer moves parameters that are not measured",
        "The optimizer moves more parameters than the problem varies.",
        "They count as fixed; with them the threshold is lower.",
        "Give the problem all parameters that are trained.",
    ),
    "other-parameters": Explanation(
        "the optimizer holds none of the problem's parameters",
        "No parameter of the problem is in the optimizer.",
        "Its first step size is taken for all of them, which may not be the one that trains them.",
        "Pass the optimizer that trains the problem's model.",
    ),
    "parameter-constants": Explanation(
        "groups differ; the first one's constants count",
        "The optimizer's groups have different constants, such as momenta.",
        "The threshold is for those of the first group.",
        "Use the same constants in all groups, or read the threshold as that of the first one.",
    ),
    "weight-decay": Explanation(
        "Adam's weight decay is not in its thresholds",
        "Adam's weight decay adds to the curvature, and the thresholds leave it out.",
        "The ratio of step size and threshold is larger by the amount given.",
        "Keep a margin of that size.",
    ),
    "clipped": Explanation(
        "the loop clips gradients; thresholds are for full steps",
        "The training loop clips gradients that are longer than its limit, and they are.",
        "Thresholds are for steps that are not clipped. Clipped ones are shorter, and more of them are stable.",
        "Read the threshold as the cautious end.",
    ),
    "metrics-lost": Explanation(
        "some measurements of the run before it stopped are lost",
        "The file of measurements had lost its end when the run went on.",
        "Curves have a gap. The training itself goes on from where it was.",
        "Nothing to do. A disk that was full, or a machine that was switched off, does this.",
    ),
    "forward-minibatch": Explanation(
        "the mini-batch threshold is only bounded",
        "Forward passes know how much gradients and Hessians of batches spread, not along which eigenvectors.",
        "The descent threshold is that of mini-batches. The mean-square threshold is only known to lie between two "
        "bounds, and the recommendation goes by the lower one, which may be far too low.",
        "Use `--curvature hessian`, or `zoscope plan --batch-size`.",
    ),
    "checkpoint": Explanation(
        "",
        "The names in the file of weights were not the model's, and were matched as the message says.",
        "A match that was not meant would measure another model.",
        "Compare the names in the message with the model's.",
    ),
    "preconditioner": Explanation(
        "",
        "The stored optimizer ran with other constants than those that the bounds were asked for.",
        "P is the stored one, the momentum is the one asked for: together they may be nobody's.",
        "Give the stored run's `--betas` and `--eps`.",
    ),
    "hf-args": Explanation(
        "",
        "Something in the training arguments has no counterpart in zoscope, or was read in a certain way.",
        "The run that is planned or checked may differ from yours in this point.",
        "Say what differs on the command line, which overrides the file.",
    ),
    "full-batch-threshold": Explanation(
        "the threshold leaves mini-batches out",
        "Training uses mini-batches, and the threshold of this optimizer is only known for the full batch.",
        "That of mini-batches can be as low as their share of the examples times it.",
        "Keep a wider margin, or use `threshold: plan`, which runs with the batches.",
    ),
    "no-mini-batches": Explanation(
        "thresholds of mini-batches could not be had",
        "Training uses mini-batches, and their thresholds could not be measured, for the reason given.",
        "The threshold shown is that of all examples; that of mini-batches is lower.",
        "Keep a wider margin, or change what the reason names.",
    ),
    "batch-noise": Explanation(
        "at this lr the noise of mini-batches raises the loss",
        "The step size is above the descent threshold of the mini-batches.",
        "Their noise raises the expected loss, to a floor or until the run diverges.",
        "Use larger batches or a smaller step size.",
    ),
    # --- good to know
    "indefinite-hessian": _good_to_know(
        "negative curvature; the paper's interval ignores it",
        "The Hessian has negative eigenvalues, as nearly always during training.",
        "The paper's interval assumes there are none and can miss on both ends. η*(N) brackets what they do: with all "
        "eigenvalues, and with the positive ones only.",
        "Go by the column of N steps, and look at how far apart its ends are.",
    ),
    "few-modes": _good_to_know(
        "few directions carry the curvature; typical runs survive more",
        "A handful of directions carry nearly all of the curvature.",
        "Thresholds are about the mean over runs, which rare directions dominate then. A typical run survives somewhat "
        "above them.",
        "Nothing, if you want to be on the safe side. `zoscope plan` says where runs really diverge.",
    ),
    "commutator": _good_to_know(
        "P and H do not commute; read Adam's thresholds as a guide",
        "Adam's preconditioner P and the Hessian H do not commute; published runs have up to about 5 %.",
        "η*(N) and the intervals assume that they do. The infinite-time threshold is exact where all eigenvalues are "
        "computed.",
        "Keep a margin as wide as the difference that the message names.",
    ),
    "preconditioner-collapsed": _good_to_know(
        "√v is below ε on many parameters",
        "On many parameters Adam's ε is larger than √v, so that the preconditioner is ε there.",
        "The thresholds of Adam collapse with it. They hold for this point; away from it v grows and lifts them.",
        "Measure where the gradient does not vanish, or with `--preconditioner state:FILE` from training.",
    ),
    "forward-only": _good_to_know(
        "forward passes bound the threshold; they do not know it",
        "Forward passes see the trace and the norm of the Hessian, but no spectrum.",
        "The lower bound assumes H ⪰ 0; the upper bound and the descent threshold assume nothing. There is no "
        "first-order bound, no λ_max and no η*(N).",
        "Use `--curvature hessian` where a backward pass fits, or `zoscope plan`.",
    ),
    "adam-forward": _good_to_know(
        "Adam's preconditioner is an average, or Adam is left out",
        "Forward passes do not see single entries of the gradient: P is taken as the same for every parameter, or Adam "
        "is left out where a stored one was asked for.",
        "Adam's bounds are those of an average parameter.",
        "Use `--curvature hessian` for Adam's own preconditioner.",
    ),
    "saturates": _good_to_know(
        "the loss levels off; half way up counts as diverged",
        "The loss does not rise to 4 times that at the start, whatever the step size.",
        "A run counts as diverged from half of the way to that plateau on.",
        "Nothing; keep it in mind when you compare with losses of your own.",
    ),
    "no-rehearsal": _good_to_know(
        "real runs were made in place of rehearsals",
        "The run cannot be rehearsed from gradients, for the reason given.",
        "Real runs take more forward passes; their answer is as good.",
        "Nothing.",
    ),
    "no-gradient": _good_to_know(
        "no gradient can be had; real runs were made",
        "The loss has no gradient that torch can take.",
        "Real runs take more forward passes than rehearsals.",
        "Nothing; or use zoscope.AutoLR, which takes neither.",
    ),
    "all-examples": _good_to_know(
        "--batch-size is not below the number of examples",
        "The batch size asked for is not below the number of examples.",
        "Every step sees all examples, so there is no noise of mini-batches.",
        "Give the spec all the data that training draws from.",
    ),
    "full-batch": _good_to_know(
        "a batch holds all examples; no step is noisy",
        "The batch size asked for is not below the number of examples.",
        "There is no noise of mini-batches; the thresholds are those of all examples.",
        "Give the spec all the data that training draws from.",
    ),
    "schedule-peak": _good_to_know(
        "lr is the peak of the schedule",
        "The step size follows a schedule, and its peak is what is held against the threshold.",
        "A short peak above the threshold may do no harm; this is the cautious end.",
        "Nothing.",
    ),
    "mini-batch": _good_to_know(
        "the threshold is that of mini-batches",
        "Steps draw a mini-batch, and the threshold is that of such mini-batches.",
        "It is lower than that of all examples. Forecasts of single runs leave this noise out.",
        "Nothing.",
    ),
    "plan-lr": _good_to_know(
        "",
        "`zoscope plan` looked ahead over the run for this check.",
        "The check holds lr against where half of the runs diverge; the best step size is lower than that.",
        "Consider the step size named in the message.",
    ),
    "not-cached": _good_to_know(
        "this measurement was not kept in the cache",
        "Something in the problem cannot be hashed, so that a change of it would go unnoticed.",
        "It is measured again every time.",
        "Give the spec plain tensors and modules, if the time matters.",
    ),
    "whole-batches": _good_to_know(
        "batches cannot be cut; every step takes a whole one",
        "The batches cannot be cut into examples.",
        "Every step takes one of the spec's batches, in random order, and `--batch-size` has no effect.",
        "Give tensors with one row per example.",
    ),
    "replicas-in-turn": _good_to_know(
        "replicas run one after another, which is slower",
        "The model does not run under torch.func.vmap, for the reason given.",
        "Replicas are stepped one after another. The result is the same.",
        "Nothing, or remove what the reason names.",
    ),
    "linearized-spectrum": _good_to_know(
        "the quadratic model runs in its eigenbasis",
        "The quadratic model has too many dimensions to run in: it runs with the eigenvalues that were measured.",
        "The runs are those of the measured spectrum.",
        "Nothing.",
    ),
    "parameter-groups": _good_to_know(
        "the threshold is that of the first group's lr",
        "The optimizer has several step sizes; curvature and threshold are for the first group's, with the others in "
        "proportion.",
        "For zeroth-order optimizers this assumes that the proportions and H nearly commute.",
        "Read the ratio of step size and threshold, which is right for all groups.",
    ),
    "streaming": _good_to_know(
        "the training set is a stream; its first examples are measured",
        "The training set is a stream without a length.",
        "Its first examples stand for all of it.",
        "Pass a problem with examples of your own choice if they do not.",
    ),
    "hvp-fallback": _good_to_know(
        "products are computed another way, less fast or exact",
        "Hessian-vector products could not be computed in the way asked for, for the reason given.",
        "They are computed in another way, which takes longer or has a small error.",
        "Nothing, or change what the reason names.",
    ),
    "gradient-hooks": _good_to_know(
        "hooks change gradients; curvature is without them",
        "Parameters have gradient hooks (`register_hook`), which scale or mask gradients on their way.",
        "First-order training sees them, zeroth-order training does not: it is the loss itself that is measured.",
        "Nothing, for zeroth-order training. For thresholds of first-order training, write them into the loss.",
    ),
    "half-precision": _good_to_know(
        "curvature is measured in float32, as 16 bits are too coarse",
        "Training steps are in 16 bits, and second derivatives are not.",
        "Each product in 16 bits would carry about 1 % of noise.",
        "Nothing.",
    ),
    "autocast": _good_to_know(
        "curvature is measured without autocast, in float32",
        "The loss runs under torch.autocast; its curvature is measured without it.",
        "Second derivatives through 16 bits carry about 1 % of noise each, which no error bar would contain.",
        "Nothing.",
    ),
    "upcast": _good_to_know(
        "a copy of the model in a wider type is measured",
        "The model is in 16 bits; a copy in a wider type is measured.",
        "It takes more memory, and rounding of weights is left out.",
        "Nothing, or choose with `--dtype`.",
    ),
    "out-of-memory": _good_to_know(
        "memory ran out; smaller micro-batches are used",
        "Memory ran out, and the micro-batch was halved.",
        "The result is the same; it takes a little longer.",
        "Start with `--micro-batch` or `--max-memory` to save the attempts.",
    ),
    "host-batches": _good_to_know(
        "the batches do not fit on the device; copying is slow",
        "The batches do not fit on the device and move there one at a time.",
        "The result is the same; it takes longer.",
        "Use fewer or smaller batches.",
    ),
    "device": _good_to_know(
        "measured on the device of the loss's own tensors",
        "The loss uses tensors that stay on their device.",
        "The measurement happens there, and not on the device asked for.",
        "Create such tensors on the device of the model.",
    ),
    "measurement": _good_to_know(
        "",
        "Two independent estimates disagree, or memory was short, as the message says.",
        "Intervals contain the disagreement; less memory makes the same precision cost more products.",
        "Measure again with another `--seed`, or with `--dtype float64`; or allow more memory.",
    ),
}
# fmt: on
"""By code, the one that matters most first."""

_ORDER = {code: place for place, code in enumerate(EXPLANATIONS)}
UNKNOWN = Explanation("", "A notice of another version of zoscope.", "", "")


def rank(code: str) -> int:
    """Place of a code, those that matter most first; one that is not known comes before all."""
    return _ORDER.get(code, -1)


def explanation(code: str) -> Explanation:
    """What is known of a code."""
    return EXPLANATIONS.get(code, UNKNOWN)
