"""Views between product and loss go with the logits; `absent` keeps the place of the second output."""


def before(
    h: "f32[2, 2, 4] | input:0",
    labels: "i64[2, 2] | input:1",
    w: "f32[8, 4] | parameter:head",
    tangent_0: "f32[] | tangent:0",
):
    # forward: head
    t: "f32[4, 8]{1, 4}" = aten.t.default(w)
    rows: "f32[4, 4]" = aten.view.default(h, [4, 4])
    mm: "f32[4, 8]" = aten.mm.default(rows, t)
    logits: "f32[2, 2, 8]" = aten._unsafe_view.default(mm, [2, 2, 8])
    # forward
    flat: "f32[4, 8]" = aten.view.default(logits, [-1, 8])
    targets: "i64[4]" = aten.view.default(labels, [-1])
    softmax: "f32[4, 8]" = aten._log_softmax.default(flat, 1, False)
    nll: "(f32[], f32[])" = aten.nll_loss_forward.default(softmax, targets, None, 1, -100)
    mean: "f32[]" = nll[0]
    count: "f32[]" = nll[1]
    # backward
    d_softmax: "f32[4, 8]" = aten.nll_loss_backward.default(tangent_0, softmax, targets, None, 1, -100, count)
    d_flat: "f32[4, 8]" = aten._log_softmax_backward_data.default(d_softmax, softmax, 1, torch.float32)
    d_logits: "f32[2, 2, 8]" = aten.view.default(d_flat, [2, 2, 8])
    # backward: head
    d_rows: "f32[4, 8]" = aten.view.default(d_logits, [4, 8])
    d_t: "f32[8, 4]{1, 8}" = aten.t.default(d_rows)
    dw: "f32[8, 4]" = aten.mm.default(d_t, rows)
    dh: "f32[4, 4]" = aten.mm.default(d_rows, w)
    return {"output:0": mean, "output:1": logits, "gradient:head": dw, "gradient:input:0": dh}


def after(
    h: "f32[2, 2, 4] | input:0",
    labels: "i64[2, 2] | input:1",
    w: "f32[8, 4] | parameter:head",
    tangent_0: "f32[] | tangent:0",
):
    # forward: head
    rows: "f32[4, 4]" = aten.view.default(h, [4, 4])
    # forward
    targets: "i64[4]" = aten.view.default(labels, [-1])
    # forward: head
    linear_cross_entropy: "(f32[], f32[], f32[2, 4])" = geminifx.linear_cross_entropy(rows, w, None, targets, 1.0, 0.0, -100, 1, 256)
    loss: "f32[]" = linear_cross_entropy[0]
    total_weight: "f32[]" = linear_cross_entropy[1]
    normalizer: "f32[2, 4]" = linear_cross_entropy[2]
    absent: "f32[0]" = geminifx.absent(loss)
    # backward: head
    linear_cross_entropy_backward: "(f32[4, 4], f32[8, 4], f32[0])" = geminifx.linear_cross_entropy_backward(tangent_0, rows, w, None, targets, total_weight, normalizer, 1.0, 0.0, -100, 1, 256, [True, True, False])
    d_hidden: "f32[4, 4]" = linear_cross_entropy_backward[0]
    d_weight: "f32[8, 4]" = linear_cross_entropy_backward[1]
    return {"output:0": loss, "output:1": absent, "gradient:head": d_weight, "gradient:input:0": d_hidden}
