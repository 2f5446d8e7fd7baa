"""Two rounds of one microbatch each: tokens are counted ahead, the first round's backward runs with the tangent that is expected, and what came in over that multiplies the sums."""


def before(
    batch: "f32[4, 4] | input:0",
    labels: "i64[4] | input:1",
    w: "f32[4, 4] | parameter:layers.0.weight",
    bias: "f32[] | parameter:bias",
    tangent: "f32[] | tangent:0",
):
    # forward
    x: "f32[2, 4]" = geminifx.microbatch(batch, 0, 2)
    square: "f32[]" = aten.mul.Tensor(bias, bias)
    # forward: layers.0
    h: "f32[2, 4]" = aten.mm.default(x, w)
    # forward
    part: "i64[2]" = geminifx.microbatch(labels, 0, 2)
    counts: "b8[2]" = aten.ne.Scalar(part, -100)
    number: "i64[]" = aten.sum.default(counts)
    of_all: "i64[]" = aten.mul.Tensor(number, 2)
    average: "i64[]" = geminifx.average(of_all)
    count: "f32[]" = aten.div.Tensor(average, 2)
    sum_1: "f32[]" = aten.sum.default(h)
    loss: "f32[]" = aten.div.Tensor(sum_1, count)
    penalized: "f32[]" = aten.add.Tensor(loss, square)
    mean: "f32[]" = geminifx.average(penalized)
    # backward
    twice: "f32[]" = aten.mul.Tensor(tangent, 2)
    slope: "f32[]" = aten.mul.Tensor(twice, bias)
    share: "f32[]" = aten.div.Tensor(tangent, count)
    dy: "f32[2, 4]{0, 0}" = aten.expand.default(share, [2, 4])
    # backward: layers.0
    xt: "f32[4, 2]{1, 4}" = aten.t.default(x)
    dw: "f32[4, 4]" = aten.mm.default(xt, dy)
    return {"output:0": mean, "gradient:layers.0.weight": dw, "gradient:bias": slope}


def after(
    batch: "f32[4, 4] | input:0",
    labels: "i64[4] | input:1",
    w: "f32[4, 4] | parameter:layers.0.weight",
    bias: "f32[] | parameter:bias",
    tangent: "f32[] | tangent:0",
    expected: "f32[] | expected:0",
):
    # forward
    part: "i64[2]" = geminifx.microbatch(labels, 0, 2)
    part_1: "i64[2]" = geminifx.microbatch(labels, 1, 2)
    counts: "b8[2]" = aten.ne.Scalar(part, -100)
    counts_1: "b8[2]" = aten.ne.Scalar(part_1, -100)
    number: "i64[]" = aten.sum.default(counts)
    number_1: "i64[]" = aten.sum.default(counts_1)
    of_all: "i64[]" = aten.mul.Tensor(number, 2)
    of_all_1: "i64[]" = aten.mul.Tensor(number_1, 2)
    add: "i64[]" = aten.add.Tensor(of_all, of_all_1)
    div: "f32[]" = aten.div.Tensor(add, 2)
    # forward F.0
    square: "f32[]" = aten.mul.Tensor(bias, bias)
    x: "f32[2, 4]" = geminifx.microbatch(batch, 0, 2)
    count: "f32[]" = aten.div.Tensor(div, 2)
    # forward F.0: layers.0
    h: "f32[2, 4]" = aten.mm.default(x, w)
    # forward F.0
    sum_1: "f32[]" = aten.sum.default(h)
    loss: "f32[]" = aten.div.Tensor(sum_1, count)
    penalized: "f32[]" = aten.add.Tensor(loss, square)
    # forward B.0
    twice: "f32[]" = aten.mul.Tensor(expected, 2)
    slope: "f32[]" = aten.mul.Tensor(twice, bias)
    mul: "f32[]" = aten.mul.Tensor(slope, 2)
    total: "f32[]" = aten._to_copy.default(mul, dtype=torch.float32)
    share: "f32[]" = aten.div.Tensor(expected, count)
    dy: "f32[2, 4]{0, 0}" = aten.expand.default(share, [2, 4])
    # forward B.0: layers.0
    xt: "f32[4, 2]{1, 4}" = aten.t.default(x)
    dw: "f32[4, 4]" = aten.mm.default(xt, dy)
    total_1: "f32[4, 4]" = aten._to_copy.default(dw, dtype=torch.float32)
    # forward F.1
    x_1: "f32[2, 4]" = geminifx.microbatch(batch, 1, 2)
    # forward F.1: layers.0
    h_1: "f32[2, 4]" = aten.mm.default(x_1, w)
    # forward F.1
    sum_2: "f32[]" = aten.sum.default(h_1)
    loss_1: "f32[]" = aten.div.Tensor(sum_2, count)
    penalized_1: "f32[]" = aten.add.Tensor(loss_1, square)
    add_1: "f32[]" = aten.add.Tensor(penalized, penalized_1)
    div_1: "f32[]" = aten.div.Tensor(add_1, 2)
    # backward
    scale: "f32[]" = aten.div.Tensor(tangent, expected)
    total_2: "f32[]" = aten.mul_.Tensor(total, scale)
    # backward B.1: layers.0
    xt_1: "f32[4, 2]{1, 4}" = aten.t.default(x_1)
    dw_1: "f32[4, 4]" = aten.mm.default(xt_1, dy)
    total_3: "f32[4, 4]" = aten.add_.Tensor(total_1, dw_1)
    total_4: "f32[4, 4]" = aten.mul_.Tensor(total_3, scale)
    return {"output:0": div_1, "gradient:layers.0.weight": total_4, "gradient:bias": total_2}
