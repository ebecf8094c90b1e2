$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write -P 1 0 4k
read -P 2 0 4k
read -P 1 4k 512
read -P 1 -s 512 -l 1k 0 8k
read -P 1 -s 3k -l 2k 0 8k
read -P 0 -s 4k 0 8k
read -P 1 -s 8k -l 1 0 8k
