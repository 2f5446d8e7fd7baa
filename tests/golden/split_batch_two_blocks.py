"""Each block runs for both microbatches before the next one; gradients are added up in float32 and rounded once."""


def before(
    batch: "bf16[4, 4] | input:0",
    w: "bf16[4, 4] | parameter:layers.0.weight",
    v: "bf16[4, 4] | parameter:layers.1.weight",
    tangent: "bf16[4, 4] | tangent:0",
):
    # forward
    x: "bf16[2, 4]" = geminifx.microbatch(batch, 0, 2)
    # forward: layers.0
    h: "bf16[2, 4]" = aten.mm.default(x, w)
    # forward: layers.1
    y: "bf16[2, 4]" = aten.mm.default(h, v)
    # backward
    t: "bf16[2, 4]" = geminifx.microbatch(tangent, 0, 2)
    # backward: layers.1
    ht: "bf16[4, 2]{1, 4}" = aten.t.default(h)
    dv: "bf16[4, 4]" = aten.mm.default(ht, t)
    vt: "bf16[4, 4]{1, 4}" = aten.t.default(v)
    dh: "bf16[2, 4]" = aten.mm.default(t, vt)
    # backward: layers.0
    xt: "bf16[4, 2]{1, 4}" = aten.t.default(x)
    dw: "bf16[4, 4]" = aten.mm.default(xt, dh)
    wt: "bf16[4, 4]{1, 4}" = aten.t.default(w)
    dx: "bf16[2, 4]" = aten.mm.default(dh, wt)
    return {"output:0": y, "gradient:layers.0.weight": dw, "gradient:layers.1.weight": dv, "gradient:input:0": dx}


def after(
    batch: "bf16[4, 4] | input:0",
    w: "bf16[4, 4] | parameter:layers.0.weight",
    v: "bf16[4, 4] | parameter:layers.1.weight",
    tangent: "bf16[4, 4] | tangent:0",
):
    # forward
    x: "bf16[2, 4]" = geminifx.microbatch(batch, 0, 2)
    x_1: "bf16[2, 4]" = geminifx.microbatch(batch, 1, 2)
    # forward: layers.0
    h: "bf16[2, 4]" = aten.mm.default(x, w)
    h_1: "bf16[2, 4]" = aten.mm.default(x_1, w)
    # forward: layers.1
    y: "bf16[2, 4]" = aten.mm.default(h, v)
    y_1: "bf16[2, 4]" = aten.mm.default(h_1, v)
    cat: "bf16[4, 4]" = aten.cat.default([y, y_1])
    # backward
    t: "bf16[2, 4]" = geminifx.microbatch(tangent, 0, 2)
    t_1: "bf16[2, 4]" = geminifx.microbatch(tangent, 1, 2)
    # backward: layers.1
    vt: "bf16[4, 4]{1, 4}" = aten.t.default(v)
    ht: "bf16[4, 2]{1, 4}" = aten.t.default(h)
    dv: "bf16[4, 4]" = aten.mm.default(ht, t)
    total: "f32[4, 4]" = aten._to_copy.default(dv, dtype=torch.float32)
    dh: "bf16[2, 4]" = aten.mm.default(t, vt)
    ht_1: "bf16[4, 2]{1, 4}" = aten.t.default(h_1)
    dv_1: "bf16[4, 4]" = aten.mm.default(ht_1, t_1)
    total_1: "f32[4, 4]" = aten.add_.Tensor(total, dv_1)
    rounded: "bf16[4, 4]" = aten._to_copy.default(total_1, dtype=torch.bfloat16)
    dh_1: "bf16[2, 4]" = aten.mm.default(t_1, vt)
    # backward: layers.0
    wt: "bf16[4, 4]{1, 4}" = aten.t.default(w)
    xt: "bf16[4, 2]{1, 4}" = aten.t.default(x)
    dw: "bf16[4, 4]" = aten.mm.default(xt, dh)
    total_2: "f32[4, 4]" = aten._to_copy.default(dw, dtype=torch.float32)
    dx: "bf16[2, 4]" = aten.mm.default(dh, wt)
    xt_1: "bf16[4, 2]{1, 4}" = aten.t.default(x_1)
    dw_1: "bf16[4, 4]" = aten.mm.default(xt_1, dh_1)
    total_3: "f32[4, 4]" = aten.add_.Tensor(total_2, dw_1)
    rounded_1: "bf16[4, 4]" = aten._to_copy.default(total_3, dtype=torch.bfloat16)
    dx_1: "bf16[2, 4]" = aten.mm.default(dh_1, wt)
    cat_1: "bf16[4, 4]" = aten.cat.default([dx, dx_1])
    return {"output:0": cat, "gradient:layers.0.weight": rounded_1, "gradient:layers.1.weight": rounded, "gradient:input:0": cat_1}
