// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {IEscrow} from "./interfaces/IEscrow.sol";
import {IRounds} from "./interfaces/IRounds.sol";
import {ISNO} from "./interfaces/ISNO.sol";

/// @title Escrow of jobs: see IEscrow. Payments are pulled, so that no receiver can stop a round.
contract Escrow is IEscrow {
    using SafeERC20 for ISNO;

    /// @notice Without a round for this long nobody has to wait for one any more.
    uint256 public constant SILENCE = 7 days;
    uint256 private constant ALL_BPS = 10_000;

    ISNO public immutable sno;
    address public immutable rounds;
    /// @notice Seconds after a job's deadline in which rounds can still settle and the payer cannot take back.
    uint256 public immutable disputeWindow;

    /// @inheritdoc IEscrow
    mapping(bytes32 escrowId => Account) public accounts;
    /// @inheritdoc IEscrow
    mapping(address account => uint256) public credits;
    /// @inheritdoc IEscrow
    mapping(address account => uint256) public coinCredits;

    constructor(ISNO sno_, uint64 disputeWindow_) {
        sno = sno_;
        rounds = sno_.rounds();
        disputeWindow = disputeWindow_;
    }

    // -- by users ------------------------------------------------------------------------------------------------------

    /// @inheritdoc IEscrow
    function escrowIdOf(uint32 networkId, address payer, bytes32 jobId) public pure returns (bytes32) {
        return keccak256(abi.encode(networkId, payer, jobId));
    }

    /// @inheritdoc IEscrow
    function deposit(uint32 networkId, bytes32 jobId, uint256 amount, uint40 deadline)
        external
        returns (bytes32 escrowId)
    {
        escrowId = _deposit(networkId, jobId, amount, deadline, false);
        sno.safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @inheritdoc IEscrow
    function depositCoin(uint32 networkId, bytes32 jobId, uint40 deadline) external payable returns (bytes32) {
        return _deposit(networkId, jobId, msg.value, deadline, true);
    }

    /// @inheritdoc IEscrow
    function refund(bytes32 escrowId) external {
        Account storage account = accounts[escrowId];
        if (account.payer == address(0)) revert UnknownEscrow(escrowId);
        uint256 until = account.deadline + disputeWindow;
        uint256 silent = IRounds(rounds).executedAt(account.networkId) + SILENCE;
        if (silent < until) until = silent;
        if (block.timestamp <= until) revert NotYetRefundable(until);
        uint256 amount = account.remaining;
        account.remaining = 0;
        _credit(account.payer, amount, account.inCoin);
        emit Refunded(escrowId, amount);
    }

    /// @inheritdoc IEscrow
    function withdraw(address account) external {
        uint256 amount = credits[account];
        if (amount == 0) revert NothingToWithdraw(account);
        credits[account] = 0;
        emit Withdrawn(account, amount);
        sno.safeTransfer(account, amount);
    }

    /// @inheritdoc IEscrow
    function withdrawCoin(address payable to) external {
        uint256 amount = coinCredits[msg.sender];
        if (amount == 0) revert NothingToWithdraw(msg.sender);
        if (to == address(0)) revert ReceiverRefused(to);
        coinCredits[msg.sender] = 0;
        emit CoinWithdrawn(msg.sender, to, amount);
        (bool sent,) = to.call{value: amount}("");
        if (!sent) revert ReceiverRefused(to);
    }

    // -- by rounds -----------------------------------------------------------------------------------------------------

    /// @inheritdoc IEscrow
    function settle(uint32 networkId, Settlement[] calldata settlements, uint256 feeBps)
        external
        returns (uint256 fees)
    {
        if (msg.sender != rounds) revert OnlyRounds(msg.sender);
        for (uint256 i = 0; i < settlements.length; ++i) {
            fees += _settle(networkId, settlements[i], feeBps);
        }
        if (fees != 0) sno.burn(fees);
    }

    // -- inside --------------------------------------------------------------------------------------------------------

    function _deposit(uint32 networkId, bytes32 jobId, uint256 amount, uint40 deadline, bool inCoin)
        private
        returns (bytes32 escrowId)
    {
        if (amount == 0) revert NothingDeposited();
        if (deadline <= block.timestamp) revert DeadlineTooEarly(deadline, block.timestamp + 1);
        escrowId = escrowIdOf(networkId, msg.sender, jobId);
        Account storage account = accounts[escrowId];
        if (account.deposited != 0 && account.inCoin != inCoin) revert OtherCurrency(escrowId);
        account.payer = msg.sender;
        account.networkId = networkId;
        account.inCoin = inCoin;
        if (deadline > account.deadline) account.deadline = deadline;
        account.deposited += amount;
        account.remaining += amount;
        emit Deposited(networkId, escrowId, msg.sender, jobId, amount, inCoin);
    }

    /// Moves one settlement and returns its fee in SNO, which the caller burns.
    function _settle(uint32 networkId, Settlement calldata settlement, uint256 feeBps) private returns (uint256 fee) {
        Account storage account = accounts[settlement.escrowId];
        (uint256 paid, bool fits) = _sum(settlement.payments, settlement.refund, account.remaining);
        bool inCoin = account.inCoin;
        // Rounded up: no series of small payments goes without a fee.
        if (fits && !inCoin) fee = (paid * feeBps + ALL_BPS - 1) / ALL_BPS;
        uint256 wanted = paid + fee + settlement.refund;
        if (account.networkId != networkId || !fits || wanted > account.remaining) {
            emit SettlementSkipped(settlement.escrowId, wanted, account.remaining);
            return 0;
        }
        account.remaining -= wanted;
        for (uint256 i = 0; i < settlement.payments.length; ++i) {
            _credit(settlement.payments[i].to, settlement.payments[i].amount, inCoin);
        }
        _credit(account.payer, settlement.refund, inCoin);
        emit Settled(settlement.escrowId, paid, fee, settlement.refund);
    }

    /// The payments' sum, and whether it and `refunded` are within `limit`. Amounts that would overflow must not revert.
    function _sum(Payment[] calldata payments, uint256 refunded, uint256 limit)
        private
        pure
        returns (uint256 paid, bool fits)
    {
        if (refunded > limit) return (0, false);
        for (uint256 i = 0; i < payments.length; ++i) {
            if (payments[i].amount > limit - refunded - paid) return (0, false);
            paid += payments[i].amount;
        }
        return (paid, true);
    }

    function _credit(address to, uint256 amount, bool inCoin) private {
        if (amount == 0) return;
        if (inCoin) coinCredits[to] += amount;
        else credits[to] += amount;
        emit Credited(to, amount, inCoin);
    }
}
