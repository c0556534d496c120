// SPDX-License-Identifier: MIT
pragma solidity ^0.8.30;

import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {IEscrow} from "./interfaces/IEscrow.sol";
import {ISNO} from "./interfaces/ISNO.sol";

/// @title Escrow of jobs: see IEscrow. Payments are pulled, so that no receiver can stop a round.
contract Escrow is IEscrow {
    using SafeERC20 for ISNO;

    ISNO public immutable sno;
    address public immutable rounds;
    /// @notice Seconds after a job's deadline in which rounds can still settle and the payer cannot take back.
    uint256 public immutable disputeWindow;

    /// @inheritdoc IEscrow
    mapping(bytes32 escrowId => Account) public accounts;
    /// @inheritdoc IEscrow
    mapping(address account => uint256) public credits;

    constructor(ISNO sno_, uint64 disputeWindow_) {
        sno = sno_;
        rounds = sno_.rounds();
        disputeWindow = disputeWindow_;
    }

    /// @inheritdoc IEscrow
    function escrowIdOf(uint32 networkId, address payer, bytes32 jobId) public pure returns (bytes32) {
        return keccak256(abi.encode(networkId, payer, jobId));
    }

    /// @inheritdoc IEscrow
    function deposit(uint32 networkId, bytes32 jobId, uint256 amount, uint64 deadline)
        external
        returns (bytes32 escrowId)
    {
        if (amount == 0) revert NothingDeposited();
        if (deadline <= block.timestamp) revert DeadlineTooEarly(deadline, block.timestamp + 1);
        escrowId = escrowIdOf(networkId, msg.sender, jobId);
        Account storage account = accounts[escrowId];
        account.payer = msg.sender;
        account.networkId = networkId;
        if (deadline > account.deadline) account.deadline = deadline;
        account.deposited += amount;
        account.remaining += amount;
        emit Deposited(networkId, escrowId, msg.sender, jobId, amount);
        sno.safeTransferFrom(msg.sender, address(this), amount);
    }

    /// @inheritdoc IEscrow
    function settle(uint32 networkId, Settlement[] calldata settlements) external {
        if (msg.sender != rounds) revert OnlyRounds(msg.sender);
        uint256 fees = 0;
        for (uint256 i = 0; i < settlements.length; ++i) {
            fees += _settle(networkId, settlements[i]);
        }
        if (fees != 0) sno.burn(fees);
    }

    /// @inheritdoc IEscrow
    function refund(bytes32 escrowId) external {
        Account storage account = accounts[escrowId];
        if (account.payer == address(0)) revert UnknownEscrow(escrowId);
        uint256 until = account.deadline + disputeWindow;
        if (block.timestamp <= until) revert NotYetRefundable(until);
        uint256 amount = account.remaining;
        account.remaining = 0;
        _credit(account.payer, amount);
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

    /// Moves one settlement and returns its fee, which the caller burns.
    function _settle(uint32 networkId, Settlement calldata settlement) private returns (uint256) {
        Account storage account = accounts[settlement.escrowId];
        uint256 paid = 0;
        for (uint256 i = 0; i < settlement.payments.length; ++i) {
            paid += settlement.payments[i].amount;
        }
        uint256 wanted = paid + settlement.fee + settlement.refund;
        if (account.networkId != networkId || wanted > account.remaining) {
            emit SettlementSkipped(settlement.escrowId, wanted, account.remaining);
            return 0;
        }
        account.remaining -= wanted;
        for (uint256 i = 0; i < settlement.payments.length; ++i) {
            _credit(settlement.payments[i].to, settlement.payments[i].amount);
        }
        _credit(account.payer, settlement.refund);
        emit Settled(settlement.escrowId, paid, settlement.fee, settlement.refund);
        return settlement.fee;
    }

    function _credit(address to, uint256 amount) private {
        if (amount == 0) return;
        credits[to] += amount;
        emit Credited(to, amount);
    }
}
