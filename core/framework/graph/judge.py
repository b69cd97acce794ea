"""``HybridJudge``: decides what follows a step's result, by rules first, then by a model, then by a plain default."""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Mapping
from typing import Any

from framework._secrets import mask_error
from framework.errors import ExpressionError
from framework.graph.calls import call, tokens_of
from framework.graph.expressions import compile_expression
from framework.graph.goal import Goal
from framework.graph.node_base import is_infrastructure_error
from framework.graph.plan import EvaluationRule, Judgment, JudgmentAction, PlanStep
from framework.graph.text import shorten, summary_of, text_of
from framework.llm.calls import cost_of, method_of

logger = logging.getLogger(__name__)

_LABEL = re.compile(r"^\W*(ACTION|CONFIDENCE|REASONING|FEEDBACK)\W*:\s*(.*)$", re.IGNORECASE)
_FORMAT_SPEC = re.compile(r"[<>^=]?[+\- ]?\d{0,3}[,_]?(?:\.\d{1,2})?[bcdeEfFgGnosxX%]?")


class HybridJudge:
    """Judges results. ``rules`` are kept sorted by descending priority, equal ones in the order they came.

    ``llm`` is asked when no rule matches; an answer less sure than ``llm_confidence_threshold`` is escalated.
    """

    def __init__(
        self, llm: Any = None, rules: list[EvaluationRule] | None = None, llm_confidence_threshold: float = 0.7
    ) -> None:
        self.llm = llm
        self.llm_confidence_threshold = llm_confidence_threshold
        self.rules: list[EvaluationRule] = []
        for rule in rules or ():
            self.add_rule(rule)

    def add_rule(self, rule: EvaluationRule) -> None:
        """Add a rule. One whose condition is not in the language is kept, never matches, and is logged."""
        try:
            compile_expression(rule.condition)
        except ExpressionError as error:
            logger.warning("Rule %r will never match: %s", rule.id, error)
        self.rules.append(rule)
        self.rules.sort(key=lambda known: -known.priority)

    def remove_rule(self, rule_id: str) -> bool:
        """Remove the rule of this id; whether there was one."""
        before = len(self.rules)
        self.rules = [rule for rule in self.rules if rule.id != rule_id]
        return len(self.rules) < before

    async def evaluate(
        self, step: PlanStep, result: Any, goal: Goal, context: Mapping[str, Any] | None = None
    ) -> Judgment:
        """What to do about ``result``, for the executor a dict of the fields of a ``StepExecutionResult``.

        The first rule whose condition holds decides; then the model; else success is accepted, and failure is retried
        while attempts remain and then sent back to the planner. A failure whose ``transient`` is false is sent back at
        once when no rule holds: no attempt can help, and no model needs to be asked. Never raises for what a rule or
        the model does.

        When the model was asked, ``context["tokens_used"]`` of the judgment is how many tokens that took, an int, and
        ``context["cost"]`` what they cost in US dollars, left out when that is nothing or not known.
        """
        success = isinstance(result, Mapping) and bool(result.get("success", False))
        names: dict[str, Any] = {
            "step": step.model_dump(),
            "result": result,
            "goal": goal.model_dump(),
            "context": context if context is not None else {},
            "success": success,
            "error": result.get("error") if isinstance(result, Mapping) else None,
        }
        for rule in self.rules:
            if _holds(rule, names):
                return Judgment(
                    action=rule.action,
                    reasoning=rule.description,
                    feedback=_fill(rule.feedback_template, names) if rule.feedback_template else None,
                    rule_matched=rule.id,
                )
        default = _default(step, result)
        if self.llm is None or _is_permanent(result):
            return default
        return await self._ask(step, result, goal, default)

    async def _ask(self, step: PlanStep, result: Any, goal: Goal, default: Judgment) -> Judgment:
        tokens, cost = 0, 0.0
        try:
            response = await call(
                method_of(self.llm),
                messages=[{"role": "user", "content": _question(step, result, goal)}],
                system="You judge whether the result of a step serves the goal. Answer in exactly the asked form.",
                max_tokens=500,
            )
            tokens, cost = tokens_of(response), cost_of(response)
            judgment = _parse(str(response.content), default)
        except Exception as error:
            # A provider may raise anything; a person decides then. The run's own store is another matter.
            if is_infrastructure_error(error):
                raise
            judgment = Judgment(
                action=JudgmentAction.ESCALATE,
                reasoning=f"The model could not be asked ({type(error).__name__}: {shorten(mask_error(error))}).",
                feedback="The result could not be judged; a person has to look at it.",
                confidence=0.0,
                llm_used=True,
            )
        if judgment.confidence < self.llm_confidence_threshold and judgment.action is not JudgmentAction.ESCALATE:
            judgment = Judgment(
                action=JudgmentAction.ESCALATE,
                reasoning=f"The model is not sure ({judgment.confidence:g} < {self.llm_confidence_threshold:g}): "
                f"{judgment.reasoning}",
                feedback=judgment.feedback,
                confidence=judgment.confidence,
                llm_used=True,
                context={"original_judgment": judgment.model_dump(mode="json")},
            )
        judgment.context["tokens_used"] = tokens
        if cost:
            judgment.context["cost"] = cost
        return judgment


def create_default_judge(llm: Any = None) -> HybridJudge:
    """A judge with the rules every plan needs; add others with ``add_rule``."""
    rules = [
        EvaluationRule(
            id="security_escalate",
            description="The step was refused for security; a person has to look at it",
            condition="result.get('error_type') == 'security'",
            action=JudgmentAction.ESCALATE,
            feedback_template="Refused for security: {error}",
            priority=200,
        ),
        EvaluationRule(
            id="max_retries_fail",
            description="The step failed in its last allowed attempt",
            condition="result.get('success') == false and step.attempts >= step.max_retries",
            action=JudgmentAction.REPLAN,
            feedback_template="Failed in all {step.attempts} attempts: {error}",
            priority=150,
        ),
        EvaluationRule(
            id="explicit_success",
            description="The step reports success",
            condition="result.get('success') == true",
            action=JudgmentAction.ACCEPT,
            priority=100,
        ),
        EvaluationRule(
            id="transient_error_retry",
            description="The error is likely to pass",
            condition="result.get('error_type') in ['timeout', 'rate_limit', 'connection_error']",
            action=JudgmentAction.RETRY,
            feedback_template="Passing error, to be tried again: {error}",
            priority=90,
        ),
        EvaluationRule(
            id="missing_data_replan",
            description="The step needs data that no earlier step provides",
            condition="result.get('error_type') == 'missing_data'",
            action=JudgmentAction.REPLAN,
            feedback_template="Data is missing: {error}",
            priority=80,
        ),
    ]
    return HybridJudge(llm=llm, rules=rules)


def _holds(rule: EvaluationRule, names: Mapping[str, Any]) -> bool:
    try:
        return compile_expression(rule.condition).test(names)
    except ExpressionError as error:
        logger.debug("Rule %r does not match: %s", rule.id, error)
        return False


def _is_permanent(result: Any) -> bool:
    """Whether the result is a failure, of which the provider's error says that it will not pass."""
    return isinstance(result, Mapping) and result.get("success", True) is False and result.get("transient") is False


def _default(step: PlanStep, result: Any) -> Judgment:
    if not (isinstance(result, Mapping) and result.get("success", True) is False):
        reasoning = "No rule matches, and there is no model to ask"
        return Judgment(action=JudgmentAction.ACCEPT, reasoning=reasoning, confidence=0.5)
    error = str(result.get("error") or "no reason given")
    if _is_permanent(result):
        reasoning = "No rule matches a failure that each attempt would come to"
        return Judgment(
            action=JudgmentAction.REPLAN, reasoning=reasoning, feedback=f"Another attempt cannot help: {error}"
        )
    if step.attempts < step.max_retries:
        reasoning = f"No rule matches a failure, and {step.max_retries - step.attempts} attempts remain"
        return Judgment(action=JudgmentAction.RETRY, reasoning=reasoning, feedback=error, confidence=0.5)
    reasoning = "No rule matches a failure, and no attempt remains"
    return Judgment(action=JudgmentAction.REPLAN, reasoning=reasoning, feedback=error, confidence=0.5)


def _question(step: PlanStep, result: Any, goal: Goal) -> str:
    return (
        f"{goal.to_prompt_context()}\n\n# Step: {step.description}\nExpected outputs: "
        f"{', '.join(step.expected_outputs) or 'none named'}\nAttempt {step.attempts} of {step.max_retries}\n\n"
        f"# Result\n{text_of(result)[:8000]}\n\nAnswer in these four lines:\n"
        "ACTION: accept | retry | replan | escalate\nCONFIDENCE: a number from 0 to 1\n"
        "REASONING: one sentence\nFEEDBACK: what to do better, or none"
    )


def _parse(reply: str, default: Judgment) -> Judgment:
    """The judgement in a reply. Without an ACTION line it is ``default``'s: a failure is never accepted by omission."""
    found: dict[str, list[str]] = {}
    label = ""
    for line in reply.splitlines():
        match = _LABEL.match(line.strip())
        if match is not None:
            label = match.group(1).lower()
            found[label] = [match.group(2).strip()]
        elif label:
            found[label].append(line.strip())
    texts = {name: "\n".join(lines).strip().strip("*").strip() for name, lines in found.items()}
    action = default.action
    if texts.get("action"):
        word = texts["action"].split()[0].strip(".,*`'\"").lower()
        known = {each.value: each for each in JudgmentAction}
        action = known.get(word, JudgmentAction.ESCALATE)
    confidence = 0.8
    if "confidence" in texts:
        try:
            confidence = min(1.0, max(0.0, float(texts["confidence"].split()[0])))
        except (ValueError, IndexError):
            confidence = 0.5
    feedback = texts.get("feedback")
    return Judgment(
        action=action,
        reasoning=texts.get("reasoning") or f"The model answered: {summary_of(reply)}",
        feedback=None if not feedback or feedback.lower().rstrip(".") in ("none", "n/a") else feedback,
        confidence=confidence if confidence == confidence else 0.5,  # NaN is a bad number too
        llm_used=True,
    )


class _SafeFormatter(string.Formatter):
    """``str.format`` that reaches keys of dicts and items of lists only, never an attribute of an object."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        head, *rest = [part for part in re.split(r"[.\[\]]+", field_name) if part]
        value = kwargs[head]
        for part in rest:
            value = value[int(part)] if isinstance(value, (list, tuple)) else dict(value)[part]
        return value, head

    def format_field(self, value: Any, format_spec: str) -> str:
        if not format_spec:
            return text_of(value)
        if _FORMAT_SPEC.fullmatch(format_spec) is None or not isinstance(value, (str, int, float)):
            raise ValueError(f"format {format_spec!r} is not supported")
        return format(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return value if conversion is None else super().convert_field(value, conversion)


def _fill(template: str, names: Mapping[str, Any]) -> str:
    try:
        return _SafeFormatter().vformat(template, (), names)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        logger.debug("template %r is used as it is: %s", template, error)
        return template
