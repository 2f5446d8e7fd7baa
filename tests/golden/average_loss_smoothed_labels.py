"""The half of a cross entropy that smooths labels is a quotient by the same labels' count, and weighed like the other.
A quotient by something else is not."""


def before(
    logits: "f32[4, 8] | input:0",
    labels: "i64[4] | input:1",
    others: "i64[4] | input:2",
    tangent_0: "f32[] | tangent:0",
):
    # forward
    softmax: "f32[4, 8]" = aten._log_softmax.default(logits, 1, False)
    nll: "(f32[], f32[])" = aten.nll_loss_forward.default(softmax, labels, None, 1, -100)
    loss: "f32[]" = nll[0]
    count: "f32[]" = nll[1]
    total: "f32[]" = aten.sum.default(softmax)
    valid: "b8[4]" = aten.ne.Scalar(labels, -100)
    number: "i64[]" = aten.sum.default(valid)
    smooth: "f32[]" = aten.div.Tensor(total, number)
    valid_1: "b8[4]" = aten.ne.Scalar(others, -100)
    number_1: "i64[]" = aten.sum.default(valid_1)
    other: "f32[]" = aten.div.Tensor(total, number_1)
    both: "f32[]" = aten.sub.Tensor(loss, smooth)
    # backward
    d_loss: "f32[4, 8]" = aten.nll_loss_backward.default(tangent_0, softmax, labels, None, 1, -100, count)
    d_total: "f32[]" = aten.div.Tensor(tangent_0, number)
    d_smooth: "f32[4, 8]{0, 0}" = aten.expand.default(d_total, [4, 8])
    d_softmax: "f32[4, 8]" = aten.sub.Tensor(d_loss, d_smooth)
    d_logits: "f32[4, 8]" = aten._log_softmax_backward_data.default(d_softmax, softmax, 1, torch.float32)
    return {"output:0": both, "output:1": other, "gradient:input:0": d_logits}


def after(
    logits: "f32[4, 8] | input:0",
    labels: "i64[4] | input:1",
    others: "i64[4] | input:2",
    tangent_0: "f32[] | tangent:0",
):
    # forward
    softmax: "f32[4, 8]" = aten._log_softmax.default(logits, 1, False)
    nll: "(f32[], f32[])" = aten.nll_loss_forward.default(softmax, labels, None, 1, -100)
    loss: "f32[]" = nll[0]
    count: "f32[]" = nll[1]
    average_1: "f32[]" = geminifx.average(count)
    share_1: "f32[]" = geminifx.share(loss, count, average_1)
    total: "f32[]" = aten.sum.default(softmax)
    valid: "b8[4]" = aten.ne.Scalar(labels, -100)
    number: "i64[]" = aten.sum.default(valid)
    smooth: "f32[]" = aten.div.Tensor(total, number)
    count_1: "f32[]" = aten._to_copy.default(number, dtype=torch.float32)
    average: "f32[]" = geminifx.average(count_1)
    share: "f32[]" = geminifx.share(smooth, count_1, average)
    valid_1: "b8[4]" = aten.ne.Scalar(others, -100)
    number_1: "i64[]" = aten.sum.default(valid_1)
    other: "f32[]" = aten.div.Tensor(total, number_1)
    mean_1: "f32[]" = geminifx.average(other)
    both: "f32[]" = aten.sub.Tensor(share_1, share)
    mean: "f32[]" = geminifx.average(both)
    # backward
    d_loss: "f32[4, 8]" = aten.nll_loss_backward.default(tangent_0, softmax, labels, None, 1, -100, average_1)
    d_total: "f32[]" = aten.div.Tensor(tangent_0, average)
    d_smooth: "f32[4, 8]{0, 0}" = aten.expand.default(d_total, [4, 8])
    d_softmax: "f32[4, 8]" = aten.sub.Tensor(d_loss, d_smooth)
    d_logits: "f32[4, 8]" = aten._log_softmax_backward_data.default(d_softmax, softmax, 1, torch.float32)
    return {"output:0": mean, "output:1": mean_1, "gradient:input:0": d_logits}
