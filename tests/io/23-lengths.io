$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
length
truncate 8M
length
read -P 0 4M 4M
write -P 1 7M 1M
truncate 6M
length
read 7M 1
truncate 8M
read -P 0 6M 2M
