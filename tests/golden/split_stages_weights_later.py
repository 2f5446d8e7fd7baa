"""A backward in two parts: gradients of inputs are sent before those of weights are computed."""


def before(
    batch: "f32[4, 4] | input:0",
    w: "f32[4, 4] | parameter:layers.0.weight",
    v: "f32[4, 4] | parameter:layers.1.weight",
    tangent: "f32[] | tangent:0",
):
    # forward
    x: "f32[2, 4]" = geminifx.microbatch(batch, 0, 2)
    # forward: layers.0
    h: "f32[2, 4]" = aten.mm.default(x, w)
    # forward: layers.1
    y: "f32[2, 4]" = aten.mm.default(h, v)
    # forward
    loss: "f32[]" = aten.mean.default(y)
    mean: "f32[]" = geminifx.average(loss)
    # backward
    share: "f32[]" = aten.div.Tensor(tangent, 2)
    dy: "f32[2, 4]{0, 0}" = aten.expand.default(share, [2, 4])
    # backward: layers.1
    ht: "f32[4, 2]{1, 4}" = aten.t.default(h)
    dv: "f32[4, 4]" = aten.mm.default(ht, dy)
    vt: "f32[4, 4]{1, 4}" = aten.t.default(v)
    dh: "f32[2, 4]" = aten.mm.default(dy, vt)
    # backward: layers.0
    xt: "f32[4, 2]{1, 4}" = aten.t.default(x)
    dw: "f32[4, 4]" = aten.mm.default(xt, dh)
    return {"output:0": mean, "gradient:layers.0.weight": dw, "gradient:layers.1.weight": dv}


def after(
    batch: "f32[4, 4] | input:0",
    v: "f32[4, 4] | parameter:layers.1.weight",
    tangent: "f32[] | tangent:0",
    expected: "f32[] | expected:0",
):
    # forward F1.0
    h_1: "f32[2, 4]" = geminifx.receive([2, 4], [4, 1], torch.float32, 0)
    # forward F1.0: layers.1
    y_1: "f32[2, 4]" = aten.mm.default(h_1, v)
    # forward F1.0
    loss_1: "f32[]" = aten.mean.default(y_1)
    # forward I1.0
    share_1: "f32[]" = aten.div.Tensor(expected, 2)
    dy_1: "f32[2, 4]{0, 0}" = aten.expand.default(share_1, [2, 4])
    # forward I1.0: layers.1
    vt_1: "f32[4, 4]{1, 4}" = aten.t.default(v)
    dh_1: "f32[2, 4]" = aten.mm.default(dy_1, vt_1)
    geminifx.send(dh_1, 0)
    # forward F1.1
    h_2: "f32[2, 4]" = geminifx.receive([2, 4], [4, 1], torch.float32, 0)
    # forward F1.1: layers.1
    y_2: "f32[2, 4]" = aten.mm.default(h_2, v)
    # forward F1.1
    loss_2: "f32[]" = aten.mean.default(y_2)
    add: "f32[]" = aten.add.Tensor(loss_1, loss_2)
    div: "f32[]" = aten.div.Tensor(add, 2)
    geminifx.send(div, 0)
    # forward W1.0: layers.1
    ht_1: "f32[4, 2]{1, 4}" = aten.t.default(h_1)
    dv_1: "f32[4, 4]" = aten.mm.default(ht_1, dy_1)
    total: "f32[4, 4]" = aten._to_copy.default(dv_1, dtype=torch.float32)
    # forward
    geminifx.finish_send(dh_1, 0)
    geminifx.finish_send(div, 0)
    # backward
    scale: "f32[]" = aten.div.Tensor(tangent, expected)
    # backward W1.1: layers.1
    ht_2: "f32[4, 2]{1, 4}" = aten.t.default(h_2)
    dv_2: "f32[4, 4]" = aten.mm.default(ht_2, dy_1)
    total_1: "f32[4, 4]" = aten.add_.Tensor(total, dv_2)
    total_2: "f32[4, 4]" = aten.mul_.Tensor(total_1, scale)
    return {"output:0": div, "gradient:layers.1.weight": total_2}
