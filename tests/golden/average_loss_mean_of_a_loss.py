"""A rank's mean is weighed by its tokens, in the backward too, and what is returned is averaged."""


def before(
    logits: "f32[4, 8] | input:0",
    labels: "i64[4] | input:1",
    tangent_0: "f32[] | tangent:0",
):
    # forward
    softmax: "f32[4, 8]" = aten._log_softmax.default(logits, 1, False)
    nll: "(f32[], f32[])" = aten.nll_loss_forward.default(softmax, labels, None, 1, -100)
    loss: "f32[]" = nll[0]
    count: "f32[]" = nll[1]
    # backward
    d_softmax: "f32[4, 8]" = aten.nll_loss_backward.default(tangent_0, softmax, labels, None, 1, -100, count)
    d_logits: "f32[4, 8]" = aten._log_softmax_backward_data.default(d_softmax, softmax, 1, torch.float32)
    return {"output:0": loss, "output:1": logits, "gradient:input:0": d_logits}


def after(
    logits: "f32[4, 8] | input:0",
    labels: "i64[4] | input:1",
    tangent_0: "f32[] | tangent:0",
):
    # forward
    softmax: "f32[4, 8]" = aten._log_softmax.default(logits, 1, False)
    nll: "(f32[], f32[])" = aten.nll_loss_forward.default(softmax, labels, None, 1, -100)
    loss: "f32[]" = nll[0]
    count: "f32[]" = nll[1]
    average: "f32[]" = geminifx.average(count)
    share: "f32[]" = geminifx.share(loss, count, average)
    mean: "f32[]" = geminifx.average(share)
    # backward
    d_softmax: "f32[4, 8]" = aten.nll_loss_backward.default(tangent_0, softmax, labels, None, 1, -100, average)
    d_logits: "f32[4, 8]" = aten._log_softmax_backward_data.default(d_softmax, softmax, 1, torch.float32)
    return {"output:0": mean, "output:1": logits, "gradient:input:0": d_logits}
