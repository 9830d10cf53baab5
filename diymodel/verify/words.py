"""What reports say, in English and Chinese. Messages of failures and reasons come from the checks and stay English."""

from __future__ import annotations

from diymodel.verify.report import Lang, Status
from diymodel.verify.tolerance import FALSE_ALARMS, HEALTHY_TRIALS

MARKS: dict[Status, str] = {
    "passed": "✓",
    "failed": "✗",
    "error": "!",
    "inconclusive": "?",
    "expected_failure": "≈",
    "skipped": "–",
}
STATUS: dict[Lang, dict[Status, str]] = {
    "en": {
        "passed": "passed",
        "failed": "failed",
        "error": "error",
        "inconclusive": "inconclusive",
        "expected_failure": "expected failure",
        "skipped": "skipped",
    },
    "zh": {
        "passed": "通过",
        "failed": "失败",
        "error": "出错",
        "inconclusive": "无法判定",
        "expected_failure": "预期失败",
        "skipped": "跳过",
    },
}
STEPS: dict[str, tuple[str, str]] = {
    "1.1": ("Logits from a language-model head", "加 lm_head，得到 logits"),
    "1.2": ("The next-token loss", "用 logits 算 loss 并反传"),
    "1.3": ("One class for the whole model", "封装成完整的语言模型类"),
    "2.1": ("Toy data", "准备玩具数据"),
    "2.2": ("The training loop", "极简训练循环"),
    "2.3": ("Overfitting a few tokens", "过拟合一小段数据"),
    "3.1": ("Generation without a cache", "无 cache 的逐 token 生成"),
    "3.2": ("Decoding with a KV cache", "用 KV cache 做增量解码"),
    "3.3": ("Train and eval mode", "用 self.training 控制分支"),
    "4.1": ("A configuration", "引入 Config"),
    "4.2": ("Saving and loading weights", "保存与加载 state_dict"),
    "4.3": ("The configuration in the checkpoint", "把 config 存进 checkpoint"),
    "5.1": ("attention_mask and padding", "支持 attention_mask"),
    "5.2": ("RMSNorm's epsilon and numerics", "RMSNorm 的 eps 与数值稳定"),
    "5.3": ("Tied weights", "embed 与 lm_head 共享权重"),
    "5.4": ("Types and docstrings", "类型注解与 docstring"),
}
WORDS: dict[Lang, dict[str, str]] = {
    "en": {
        "title": "Verification of",
        "called": "Called as",
        "device": "Device",
        "dtype": "Dtype",
        "profile": "Profile",
        "seed": "Seed",
        "time": "Time",
        "seconds": "s",
        "checks": "Checks",
        "step": "Step",
        "failures": "Failures",
        "expected": "Expected",
        "seen": "Seen",
        "raised": "Raised",
        "same": "The same error, from the same line, in",
        "cause": "Most likely cause",
        "others": "Other causes",
        "difference": "Largest difference",
        "tolerance": "explained by rounding",
        "traceback": "Where in the subject's own code",
        "config": "Smallest configuration",
        "input": "Smallest input",
        "replay": "Replay",
        "select": "a click selects the whole command",
        "more": "Read more",
        "diagnosis": "Diagnosis: the bugs that this pattern of failures looks like",
        "beside": "A further bug, for the failures that are not explained by then",
        "instead": "Or instead of one of these",
        "unknown": "none that we know: the pattern fits no class of bugs (diymodel zoo list)",
        "doubtful": "none that we know fits well. The nearest, which may all be wrong:",
        "raises": "none: the model raises an error; fix that first, and verify it again",
        "unexplained": "Not explained by these",
        "look": "Look for",
        "explain": "What this check means and how to fix it",
        "equal": "Two results count as equal if they differ by at most 1e-11 of the largest value (in float64), by "
        "16 times the subject's own measured rounding (4 times in half types), or by one step of float32 where it "
        "computes in that (16, in the result or in the weights, where only one of two ways does). With this rule there "
        "were {alarms} false alarms in more than {trials:,} trials of correct models.",
        "refused": "configurations were refused by the subject",
        "left_out": "left out after an error",
    },
    "zh": {
        "title": "验证报告：",
        "called": "调用方式",
        "device": "设备",
        "dtype": "精度",
        "profile": "强度",
        "seed": "随机种子",
        "time": "用时",
        "seconds": "秒",
        "checks": "检查项",
        "step": "路线",
        "failures": "失败详情",
        "expected": "应当",
        "seen": "实际",
        "raised": "异常",
        "same": "以下检查抛出同一行的同一个异常",
        "cause": "最可能的原因",
        "others": "其他可能",
        "difference": "最大差异",
        "tolerance": "舍入误差可解释",
        "traceback": "出错位置（被测代码）",
        "config": "最小配置",
        "input": "最小输入",
        "replay": "重放命令",
        "select": "点一下即可全选",
        "more": "详细说明",
        "diagnosis": "诊断：这些失败合起来像是哪种 bug",
        "beside": "此外，对于至此仍解释不了的失败",
        "instead": "也可能不是以上之一，而是",
        "unknown": "不像任何已知的 bug 类型（diymodel zoo list）",
        "doubtful": "没有哪种已知的 bug 很吻合。以下是最接近的，可能都不对：",
        "raises": "无法诊断：模型抛出了异常；先修好它，再验证一次",
        "unexplained": "以上都解释不了的失败",
        "look": "该看哪里",
        "explain": "这项检查的含义与修法",
        "equal": "“相等”指与最大值相差不超过 1e-11（float64），或不超过模型自身实测舍入误差的 16 倍（半精度为 4 倍），"
        "内部用 float32 计算的则不超过 float32 的一个最小间隔（两条路径里只有一条如此的，结果或权重不超过 16 个）："
        "按这条规则，在正确的模型上试验超过 {trials:,} 次，误报 {alarms} 次。",
        "refused": "个配置被模型拒绝构建",
        "left_out": "试用时出错、没有检查",
    },
}


def equal_means(lang: Lang) -> str:
    """The rule by which results are compared, and how often it cried wolf."""
    return WORDS[lang]["equal"].format(alarms=FALSE_ALARMS, trials=HEALTHY_TRIALS)
