"""A sum with a bias, a softcap and a cast; frozen hidden states need no gradient. The loss is rounded once."""


def before(
    h: "bf16[4, 4] | input:0",
    labels: "i64[4] | input:1",
    w: "bf16[8, 4] | parameter:head",
    b: "bf16[8] | parameter:bias",
    tangent_0: "bf16[] | tangent:0",
):
    # forward: head
    t: "bf16[4, 8]{1, 4}" = aten.t.default(w)
    addmm: "bf16[4, 8]" = aten.addmm.default(b, h, t)
    small: "bf16[4, 8]" = aten.div.Tensor(addmm, 4.0)
    tanh: "bf16[4, 8]" = aten.tanh.default(small)
    capped: "bf16[4, 8]" = aten.mul.Tensor(tanh, 4.0)
    # forward
    softmax: "bf16[4, 8]" = aten._log_softmax.default(capped, -1, False)
    nll: "(bf16[], bf16[])" = aten.nll_loss_forward.default(softmax, labels, None, 2, 0)
    total: "bf16[]" = nll[0]
    count: "bf16[]" = nll[1]
    # backward
    d_softmax: "bf16[4, 8]" = aten.nll_loss_backward.default(tangent_0, softmax, labels, None, 2, 0, count)
    d_capped: "bf16[4, 8]" = aten._log_softmax_backward_data.default(d_softmax, softmax, -1, torch.bfloat16)
    d_tanh: "bf16[4, 8]" = aten.mul.Tensor(d_capped, 4.0)
    d_small: "bf16[4, 8]" = aten.tanh_backward.default(d_tanh, tanh)
    d_addmm: "bf16[4, 8]" = aten.div.Tensor(d_small, 4.0)
    # backward: head
    d_t: "bf16[8, 4]{1, 8}" = aten.t.default(d_addmm)
    dw: "bf16[8, 4]" = aten.mm.default(d_t, h)
    sum_1: "bf16[1, 8]" = aten.sum.dim_IntList(d_addmm, [0], True)
    db: "bf16[8]" = aten.view.default(sum_1, [8])
    return {"output:0": total, "gradient:head": dw, "gradient:bias": db}


def after(
    h: "bf16[4, 4] | input:0",
    labels: "i64[4] | input:1",
    w: "bf16[8, 4] | parameter:head",
    b: "bf16[8] | parameter:bias",
    tangent_0: "bf16[] | tangent:0",
):
    # forward: head
    linear_cross_entropy: "(f32[], f32[], f32[2, 4])" = geminifx.linear_cross_entropy(h, w, b, labels, 0.25, 4.0, 0, 2, 256)
    loss: "f32[]" = linear_cross_entropy[0]
    total_weight: "f32[]" = linear_cross_entropy[1]
    normalizer: "f32[2, 4]" = linear_cross_entropy[2]
    # forward
    _to_copy: "bf16[]" = aten._to_copy.default(loss, dtype=torch.bfloat16)
    # backward: head
    linear_cross_entropy_backward: "(bf16[0], bf16[8, 4], bf16[8])" = geminifx.linear_cross_entropy_backward(tangent_0, h, w, b, labels, total_weight, normalizer, 0.25, 4.0, 0, 2, 256, [False, True, True])
    d_weight: "bf16[8, 4]" = linear_cross_entropy_backward[1]
    d_bias: "bf16[8]" = linear_cross_entropy_backward[2]
    return {"output:0": _to_copy, "gradient:head": d_weight, "gradient:bias": d_bias}
