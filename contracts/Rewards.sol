// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {IRegistry} from "./interfaces/IRegistry.sol";
import {IRounds} from "./interfaces/IRounds.sol";
import {ISNO} from "./interfaces/ISNO.sol";
import {MerklePath} from "./libraries/MerklePath.sol";

/// @title The rewards' half of Rounds: see IRounds. What may be allotted, under which roots it is claimed, who stops one.
abstract contract Rewards is IRounds {
    using SafeERC20 for ISNO;

    /// One word for what every round reads and writes, one for the link to the round before.
    struct Network {
        uint48 round;
        uint40 executedAt;
        uint40 emittedUntil;
        uint16 shareBps;
        bool open;
        bool changing; // `next` takes effect with the next round
        Parameters parameters;
        uint48 frozenFrom; // this round's root and later ones cannot be claimed under; 0: none
        bytes32 previousHash;
        Parameters next;
        address freezer;
    }

    struct Root {
        uint48 round;
        uint40 setAt;
        bool frozen;
        uint128 allotment;
        bytes32 root;
    }

    /// @notice Roots kept per network. A claim needs one that is older than the claim delay, while rounds go on.
    uint256 public constant KEPT_ROOTS = 64;
    uint256 internal constant ALL_BPS = 10_000;
    uint256 private constant WORKERS_PERCENT = 85;

    ISNO public immutable sno;
    IRegistry public immutable registry;
    uint256 public immutable roundInterval;
    uint256 public immutable claimDelay;
    /// @notice Wei of SNO that a validator pays to freeze a root, and loses if the next quorum upholds the root.
    uint256 public immutable freezeBond;

    mapping(uint32 networkId => Network) internal _networks;
    mapping(uint32 networkId => mapping(uint256 place => Root)) internal _roots;
    /// @inheritdoc IRounds
    mapping(uint32 networkId => mapping(address account => uint256)) public claimedBy;

    constructor(ISNO sno_, IRegistry registry_, Settings memory settings) {
        if (settings.roundInterval == 0) revert BadSettings();
        // Or the last final root would be overwritten before the next one becomes final.
        if (settings.claimDelay > settings.roundInterval * (KEPT_ROOTS / 2)) revert BadSettings();
        sno = sno_;
        registry = registry_;
        roundInterval = settings.roundInterval;
        claimDelay = settings.claimDelay;
        freezeBond = settings.freezeBond;
    }

    /// @inheritdoc IRounds
    function claim(uint32 networkId, uint64 round, address account, uint256 total, bytes32[] calldata proof)
        external
        returns (uint256 amount)
    {
        Root storage root = _roots[networkId][round % KEPT_ROOTS];
        _checkFinal(root, round);
        bytes32 leaf = keccak256(
            bytes.concat(keccak256(abi.encode(block.chainid, address(this), networkId, account, total)))
        );
        if (MerklePath.root(proof, leaf) != root.root) revert BadProof();
        mapping(address account => uint256) storage claimed = claimedBy[networkId];
        uint256 before = claimed[account];
        if (total <= before) return 0;
        amount = total - before;
        claimed[account] = total;
        emit Claimed(networkId, account, amount);
        sno.pay(networkId, account, amount); // what the network was allotted is all that it can pay
    }

    /// @inheritdoc IRounds
    function freeze(uint32 networkId, uint64 round) external {
        Network storage network = _networks[networkId];
        Root storage root = _roots[networkId][round % KEPT_ROOTS];
        if (root.round != round || root.root == bytes32(0)) revert NoRoot(round);
        if (block.timestamp >= root.setAt + claimDelay) revert RootIsFinal(round);
        if (network.frozenFrom != 0) revert RootFrozen(network.frozenFrom);
        if (!registry.isLiveValidator(networkId, msg.sender)) revert OnlyValidators(msg.sender);
        network.frozenFrom = uint48(round);
        network.freezer = msg.sender;
        for (uint256 i = round; i <= network.round; ++i) {
            _roots[networkId][i % KEPT_ROOTS].frozen = true; // within the claim delay: fewer than are kept
        }
        emit Frozen(networkId, round, msg.sender, freezeBond);
        sno.safeTransferFrom(msg.sender, address(this), freezeBond);
    }

    /// @inheritdoc IRounds
    function emission(uint32 networkId, uint64 until) public view returns (uint256) {
        Network storage network = _networks[networkId];
        uint256 from = network.emittedUntil;
        // Silence is no backlog to grab: what is older than two intervals lapses.
        if (until > from + 2 * roundInterval) from = until - 2 * roundInterval;
        if (until <= from) return 0;
        return (sno.mintableBetween(from, until) * network.shareBps) / ALL_BPS;
    }

    // -- inside --------------------------------------------------------------------------------------------------------

    function _checkFinal(Root storage root, uint64 round) private view {
        if (root.round != round || round == 0) revert NoRoot(round);
        uint256 until = root.setAt + claimDelay;
        if (block.timestamp < until) revert ClaimTooEarly(until);
        if (root.frozen) revert RootFrozen(round);
    }

    /// Decides about a frozen root: returns what its allotments, destroyed now, leave to be allotted anew. A ruling on
    /// another root than the one that is frozen by now decides nothing and must not block the round.
    function _rule(Network storage network, Proposal calldata proposal) internal returns (uint256 released) {
        uint48 from = network.frozenFrom;
        if (from == 0 || from != proposal.ruledRound || proposal.ruling == Ruling.None) return 0;
        address freezer = network.freezer;
        bool upheld = proposal.ruling == Ruling.Uphold;
        network.frozenFrom = 0;
        emit Ruled(proposal.networkId, from, proposal.ruling, freezer);
        for (uint256 i = 0; i < KEPT_ROOTS && from + i <= network.round; ++i) {
            Root storage root = _roots[proposal.networkId][(from + i) % KEPT_ROOTS];
            root.frozen = false;
            if (upheld) continue;
            released += root.allotment;
            delete _roots[proposal.networkId][(from + i) % KEPT_ROOTS];
        }
        if (upheld) {
            sno.burn(freezeBond);
        } else {
            if (released != 0) sno.takeBack(proposal.networkId, released);
            sno.safeTransfer(freezer, freezeBond);
        }
    }

    /// Workers share at most what the burned fees, times kappa, allow; signers their part in any case.
    function _allot(Network storage network, Proposal calldata proposal, uint256 fees, uint256 released) internal {
        uint256 amount = proposal.allotment;
        if (proposal.rewardsRoot == bytes32(0)) {
            if (amount != 0) revert AllotmentWithoutRoot();
            return;
        }
        _roots[proposal.networkId][proposal.round % KEPT_ROOTS] = Root({
            round: uint48(proposal.round),
            setAt: uint40(block.timestamp),
            frozen: network.frozenFrom != 0,
            allotment: uint128(amount),
            root: proposal.rewardsRoot
        });
        if (amount == 0) return;
        uint256 emitted = emission(proposal.networkId, proposal.until);
        uint256 workers = (emitted * WORKERS_PERCENT) / 100;
        uint256 cap = _workersCap(network.parameters, fees);
        uint256 allowed = emitted - workers + (workers < cap ? workers : cap) + released;
        if (amount > allowed) revert AllotmentTooLarge(amount, allowed);
        sno.mint(proposal.networkId, amount);
    }

    /// The most that workers may get for `fees` burned in a round.
    function _workersCap(Parameters memory parameters, uint256 fees) private pure returns (uint256) {
        if (parameters.kappaBps == type(uint32).max) return type(uint256).max;
        return (fees * parameters.kappaBps) / ALL_BPS;
    }
}
