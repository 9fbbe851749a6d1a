// Includes the params structs and the functions of all ops, in the order of ops.def.
#pragma once

#include "attention.h"
#include "attention_backward.h"
#include "cross_entropy.h"
#include "embedding.h"
#include "linear.h"
#include "lora.h"
#include "quantize.h"
#include "repack.h"
#include "rms_norm.h"
#include "rope.h"
#include "rotate.h"
#include "sample.h"
#include "swiglu.h"
