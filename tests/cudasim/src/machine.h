// Decoded programs and the state of the simulated machine: launches, blocks, warps.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "memory.h"
#include "ptx.h"

namespace cudasim {

using Mask = uint32_t;
constexpr Mask kFull = 0xffffffffu;
struct Warp;
struct Instr;
struct Block;
struct Launch;
struct Worker;
struct RaceState;
using Handler = void (*)(Warp&, const Instr&, Mask);

// ---- decoded code ------------------------------------------------------------------------------

enum class Kind : uint8_t { Op, Bra, Brx, Call, CallInd, Ret, Exit, Bar, WarpOp, Nop };

// Instruction classes of the statistics.
enum class Cls : uint8_t {
  Int, Fp32, Fp64, Half, Sfu, Cvt, Mov, Pred, Branch, LdGlobal, StGlobal, LdShared, StShared, LdStLocal, LdConst,
  Atomic, CpAsync, LdMatrix, Mma, Shfl, Barrier, Other, Count
};
extern const char* const kClsNames[];

// An operand names 32 lanes of storage: top two bits choose the bank, the rest is a slot (32 lanes x 4 bytes).
constexpr uint32_t kBankReg = 0, kBankConst = 1, kBankSpecial = 2, kBankPred = 3;
constexpr uint32_t kNone = 0xffffffffu;
inline uint32_t mkOp(uint32_t bank, uint32_t slot) { return bank << 30 | slot; }

// Floating-point environment of an instruction: rounding (bits 0-1, as MXCSR.RC) and flush-to-zero (bit 2).
constexpr uint8_t kRn = 0, kRm = 1, kRp = 2, kRz = 3, kFtz = 4;

struct Instr {
  Handler fn = nullptr;
  uint32_t op[5] = {kNone, kNone, kNone, kNone, kNone};
  uint32_t ext = 0, next = 0;      // further operands: Program::ext[ext .. ext+next)
  int32_t guard = -1;              // predicate index
  bool guardNeg = false, strong = false;   // strong: .volatile, .relaxed, .acquire, .release
  Kind kind = Kind::Op;
  Cls cls = Cls::Other;
  uint8_t fpmode = 0;
  uint8_t space = 0;               // Space of memory instructions
  uint8_t nvec = 1, elem = 0;      // memory: vector length and element bytes
  uint8_t sub = 0;                 // handler specific
  int32_t target = -1;             // branch target pc, callee, barrier operand...
  uint32_t arg = 0;                // handler specific
  int64_t imm = 0;                 // address offset and the like
  int32_t stmt = 0;                // index into Program::src
};

struct SrcInfo { int line = 0; Loc loc; const Function* fn = nullptr; std::string_view text; };

struct FuncInfo {
  const Function* fn = nullptr;
  uint32_t entry = 0, slots = 0, preds = 0, localBytes = 0;
  std::vector<uint32_t> paramOff, paramSize, retOff, retSize;   // in the frame's local memory
};

struct Program {
  const Module* mod = nullptr;
  const Function* kernel = nullptr;
  std::string name, pretty;
  std::vector<Instr> code;
  std::vector<uint32_t> ext;
  std::vector<SrcInfo> src;
  std::vector<FuncInfo> funcs;
  std::unordered_map<uint64_t, int> funcByAddr;
  std::vector<uint32_t> constants;                  // bank: 32 lanes per slot
  std::vector<std::pair<uint32_t, uint32_t>> params; // offset, size
  uint32_t paramBytes = 0;
  uint32_t staticShared = 0, localBytes = 0;
  int registers = 0;                                // estimate: peak live 32-bit registers
  bool usesIndirectCalls = false, recursive = false, usesReservedShared = false;
  struct SharedVar { std::string name; uint32_t offset, bytes; };
  std::vector<SharedVar> sharedVars;
  uint32_t* constBank = nullptr;                    // aligned copy of constants
  std::unique_ptr<uint32_t[]> constStore;
};

constexpr uint64_t kFuncBase = 0x7f7f00000000ull;   // "addresses" of device functions

// Lowers one kernel and everything it calls.  Addresses of module variables come from the resolver.
struct SymbolResolver { virtual uint64_t addressOf(const std::string& name) const = 0; };
std::unique_ptr<Program> lowerKernel(const Module& m, const Function& kernel, const SymbolResolver& syms);

// ---- machine state -----------------------------------------------------------------------------

struct SimError {
  int code;                        // cudaError_t
  std::string text;
};

struct Frame {
  Frame* parent = nullptr;
  uint32_t retpc = 0, depth = 0;
  const FuncInfo* fn = nullptr;
  uint32_t regBase = 0, predBase = 0, localBase = 0;
  std::vector<std::unique_ptr<Frame>> children;     // one per (return pc, callee)
};

enum class FragState : uint8_t { Run, WaitWarp, WaitBar };
struct Frag {                      // lanes of a warp that execute together
  uint32_t pc = 0;
  Mask mask = 0;
  Frame* frame = nullptr;
  FragState state = FragState::Run;
  int bar = 0;
  uint64_t stamp = 0;
};

struct PendingCopy {               // a cp.async whose data has not landed
  Mask lanes;
  uint32_t pc;
  uint8_t bytes;
  uint32_t dst[32];
  uint32_t group[32];
  uint8_t data[32][16];
};

enum class RunStatus { Yield, Blocked, Done };

struct alignas(64) Warp {
  uint32_t* bank[4] = {};          // current frame's registers, constants, special registers
  uint32_t* preds = nullptr;       // current frame's predicates
  Block* blk = nullptr;
  Worker* wk = nullptr;
  const Program* prog = nullptr;
  uint32_t pc = 0;
  Frame* frame = nullptr;
  Mask live = 0, active = 0;
  bool yield = false;              // set by spinning instructions
  int index = 0;
  uint8_t* local = nullptr;        // lane i's local memory starts at local + i * localStride
  uint32_t localStride = 0;

  Frag frags[33];
  int nfrags = 0;
  uint64_t stampCounter = 0;
  Frame root;

  std::vector<PendingCopy> pending;
  uint32_t groupsCommitted[32] = {};

  // race detector clocks: barriers, barriers and __syncwarp, these and warp-wide instructions
  uint32_t clock = 1, syncEpoch = 1, convEpoch = 1;
  Mask carry = 0;                  // CC.CF per lane

  uint32_t* regStore = nullptr;
  size_t regSlots = 0;
  std::vector<uint32_t> predStore;
  std::vector<uint8_t> localStore;
  std::unique_ptr<uint32_t[]> regMem, specialMem;

  void setFrame(Frame* f) {
    frame = f;
    bank[0] = regStore + size_t(f->regBase) * 32;
    preds = predStore.data() + f->predBase;
  }
  uint32_t* u32(uint32_t o) const { return bank[o >> 30] + size_t(o & 0x3fffffff) * 32; }
  uint64_t* u64(uint32_t o) const { return reinterpret_cast<uint64_t*>(u32(o)); }
  uint8_t* laneLocal(int lane) const { return local + size_t(lane) * localStride + frame->localBase; }
  uint32_t pred(uint32_t o) const { return preds[o & 0x3fffffff]; }
  void setPred(uint32_t o, Mask m, Mask v) { uint32_t& p = preds[o & 0x3fffffff]; p = (p & ~m) | (v & m); }
  RunStatus run(uint64_t quantum);
 private:
  template <bool STATS> RunStatus loop(uint64_t quantum);
  int pick();
  void mergeFrags();
  int addFrag(uint32_t pc, Mask m, Frame* f, FragState st = FragState::Run);
  void removeFrag(int i);
  void wakeWaiting();
  friend struct Block;
};

struct Barrier {
  uint32_t expected = 0;           // 0: all threads of the block
  uint32_t arrived = 0;
  uint64_t warps = 0;              // warps that arrived (bit per warp)
  bool andv = true, orv = false;
  uint32_t popc = 0;
};

struct PcStat {
  uint64_t execs = 0, lanes = 0, sectors = 0, usefulBytes = 0, bytes = 0, wavefronts = 0, idealWavefronts = 0, divergent = 0;
  PcStat& operator+=(const PcStat& b) {
    execs += b.execs; lanes += b.lanes; sectors += b.sectors; usefulBytes += b.usefulBytes; bytes += b.bytes;
    wavefronts += b.wavefronts; idealWavefronts += b.idealWavefronts; divergent += b.divergent;
    return *this;
  }
};

struct Block {
  Launch* launch = nullptr;
  Worker* wk = nullptr;
  uint64_t linear = 0;
  uint32_t ctaid[3] = {};
  uint8_t* shared = nullptr;       // host address = generic address of the shared window
  uint32_t sharedBytes = 0, reservedOffset = 0;
  uint8_t* shadow = nullptr;       // per byte: 0 never written, 1 written, 2 cp.async in flight; null when unchecked
  std::unique_ptr<uint8_t[]> sharedMem, shadowMem;
  std::vector<std::unique_ptr<Warp>> warps;
  Barrier bars[16];
  std::unique_ptr<RaceState> race;
  uint32_t liveWarps = 0;
  uint64_t exited = 0;             // warps (bit per warp)
  uint32_t nextWarp = 0;
  uint64_t asyncInFlight = 0;      // cp.async copies issued and not landed
  Block();
  ~Block();
  void start(Launch& l, Worker& w, uint64_t linearId);
  RunStatus run(uint64_t budget, uint64_t warpQuantum);
  void warpExited(int index);
  void tryRelease(int id);
  [[noreturn]] void reportDeadlock();
};

struct alignas(128) Worker {
  Launch* launch = nullptr;
  Warp* current = nullptr;              // running now
  std::vector<CachedRange> ranges;      // per pc
  std::vector<PcStat> stats;            // per pc, when enabled
  uint64_t warpInstrs = 0, threadInstrs = 0;
  std::string printBuf;
};

struct Launch {
  const Program* prog = nullptr;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  uint32_t threads = 0, nwarps = 0;
  uint32_t dynShared = 0, localStride = 0;
  bool cooperative = false;
  uint64_t nblocks = 0;
  std::vector<uint8_t> params;
  uint64_t gridId = 0, workspace = 0;  // workspace: grid barrier of cooperative launches
  std::atomic<uint64_t> nextBlock{0};
  std::atomic<uint64_t> instrTotal{0};
  std::atomic<bool> stop{false};
  bool stats = false, race = false;
  std::vector<PcStat> pcStats;
  uint64_t warpInstrs = 0, threadInstrs = 0;
  double seconds = 0;
};

// Runs the launch to completion; returns 0 or the cudaError_t, having printed the report.
int runLaunch(Launch& l);

// Where a lane is, for messages.
std::string describe(const Warp& w, int lane);
std::string demangle(const std::string& s);
std::string oneLine(std::string_view text);                // white space collapsed
[[noreturn]] void simFail(const Warp& w, int lane, int code, const std::string& what);
void simWarn(const Warp& w, int lane, const std::string& what);
extern std::mutex gReportMutex;
void printReport(const std::string& text);   // under gReportMutex; kept for cudasim_take_report
constexpr unsigned kCsrDefault = 0x1f80;            // MXCSR: all exceptions masked, round to nearest

struct Options {
  int threads = 0;
  int hostPointers = 0;            // 0 refused, 1 allowed while no host range is registered, 2 allowed
  bool abortOnError = false, sticky = false;
  bool race = false;
  int initShared = 2;              // 0 off, 1 warn, 2 error
  bool initGlobal = false;
  bool poison = true;
  bool strictMma = false;          // model the truncating accumulation of tensor cores
  int arch = 80;
  uint64_t maxInstr = 0;
  std::string statsPath;
  bool verbose = false;
};
Options& options();

// cudaError_t values used inside the engine
enum { kErrInvalidValue = 1, kErrIllegalInstruction = 715, kErrMisaligned = 716, kErrIllegalAddress = 700, kErrAssert = 710,
       kErrTimeout = 702, kErrLaunchFailure = 719, kErrNotSupported = 801, kErrHardwareStack = 714 };

}  // namespace cudasim
